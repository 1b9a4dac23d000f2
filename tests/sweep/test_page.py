"""`sweep.html` in a real browser: drawn without an error, from the one file alone, and with the right numbers."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import Opened
from finished_sweep import REASON, TRACEBACK, add_by_hand, add_trial, new_manifest, real_sweep, state_of

from dino.sweep.collect import Results, collect
from dino.sweep.figures import MAX_POINTS, pictures, thinned
from dino.sweep.page import page

KNN = "val/knn_top1"


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Opened]:
    """`browse(html)`."""

    def open_page(content: str) -> Opened:
        page = tmp_path_factory.mktemp("browser") / "sweep.html"
        page.write_text(content)
        return browser.browse(page)

    return open_page


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return collect(*real_sweep(tmp_path_factory.getbasetemp() / "real_sweep"))


@pytest.fixture(scope="module")
def opened(results: Results, browse: Callable[[str], Opened]) -> Opened:
    return browse(page(results))


def by_hand(folder: Path, settings: list[dict[str, Any]], **changes: Any) -> Results:
    """A sweep of finished trials, one seed each, whose metric is 50, 51, ... at the end."""
    manifest = new_manifest(folder, **changes)
    for place, each in enumerate(settings):
        lines = [{"step": step, KNN: value, "train/loss": 3.0} for step, value in ((0, 9.0), (5, 50.0 + place))]
        add_by_hand(manifest, each, 0, lines)
    return collect(manifest, {trial.id: state_of(manifest, trial, "finished") for trial in manifest.trials})


# ---------------------------------------------------------------------- a real sweep


def test_it_opens_without_a_word_on_the_console(opened: Opened) -> None:
    assert opened.console == []
    curves = ["curve_train_loss", "curve_val_knn_top1", "curve_val_effective_rank"]
    assert opened.figures == ["over_axes", *curves, "parallel_coordinates"]


@pytest.mark.parametrize(
    "addition",
    [
        "<script>throw new Error('broken')</script>",
        "<script>Plotly.newPlot('nowhere', [])</script>",
        "<img src='http://localhost:1/elsewhere.png'>",
        "<script src='https://cdn.plot.ly/plotly.min.js'></script>",
    ],
    ids=["error", "no such element", "image from elsewhere", "script from elsewhere"],
)
def test_a_page_that_fails_or_reaches_out_would_be_noticed(
    results: Results, browse: Callable[[str], Opened], addition: str
) -> None:
    assert browse(page(results).replace("</body>", f"{addition}</body>")).console != []


def test_the_heat_map_shows_every_finished_setting(results: Results, opened: Opened) -> None:
    drawn = opened.figure("over_axes")
    assert re.search(r'<g class="hm">\s*<image[^>]+href="data:image/png', drawn)
    cells = re.findall(r'class="heatmap-label"[^>]*>(.*?)</text>', drawn)
    spreads = [setting.over_seeds(KNN) for setting in results.settings]
    assert len(cells) == sum(spread is not None for spread in spreads) == 4
    for spread in spreads:
        assert spread is None or any(str(spread) in cell and "n = 2" in cell for cell in cells)
    for words in ("loss.teacher_temp", "ema.momentum", "val/knn_top1 [%]", "0.996", "0.07"):
        assert words in drawn


def test_every_trial_that_logged_has_its_curve(results: Results, opened: Opened) -> None:
    for name in ("train/loss", KNN, "val/effective_rank"):
        figure = f"curve_{name.replace('/', '_')}"
        logged = [row for row in results.rows if row.curves[name]]
        assert len(opened.lines(figure)) == len(logged)
        assert "optimizer step" in opened.figure(figure)
    assert len(results.rows) == 12
    assert len([row for row in results.rows if row.curves["train/loss"]]) == 11, "one has not begun"


def test_parallel_coordinates_are_lines_of_svg(results: Results, opened: Opened) -> None:
    lines = opened.lines("parallel_coordinates")
    assert len(lines) == 8
    assert max(len(re.findall("[ML]", line)) for line in lines) == 4, "there are four columns"
    ends = {(re.findall("[ML]([^,]+)", line)[0], re.findall("[ML]([^,]+)", line)[-1]) for line in lines}
    assert len(ends) == 1, "every line goes from the first to the last"
    assert "<canvas" not in opened.dom


def test_tables_and_words_are_there(results: Results, opened: Opened) -> None:
    assert results.summary in opened.text
    for setting in results.settings:
        assert str(setting.over_seeds(KNN) or "0 of 2") in opened.text
    for row in results.rows:
        assert row.trial.id in opened.text
    assert TRACEBACK in opened.text
    assert results.best_row is not None
    assert results.best_row.command in opened.text
    assert results.manifest.snapshots[0].commit in opened.text
    assert f"rank correlation of the two: {results.rank_correlation:.2f}" in opened.text
    assert "teacher_temp: 0.0" in opened.text, "the frozen settings of the best trial"


def test_whatever_comes_from_outside_is_text(opened: Opened) -> None:
    """The reason of the failed trial closes a script and opens another one."""
    assert REASON in opened.text
    assert "<b>no</b>" not in opened.dom
    assert "<script>throw" not in opened.dom
    assert "node<1>" in opened.text


# ---------------------------------------------------------------------- whatever there is


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([{"lr": value} for value in (1e-5, 1e-4, 1e-3, 1e-2)], "1e-05"),
        ([{"backbone": name} for name in ("vit_s16", "resnet50")], "vit_s16"),
        ([{"a": a, "b": b, "c": c} for a in (1, 2) for b in (3, 4) for c in (5, 6)], "n = 1"),
        ([{"a": 0.1, "b": 0.9}, {"a": 0.01, "b": 0.99}, {"a": 0.001, "b": 0.999}], "0.99"),
        ([{"a": 0.1 * n**2, "b": 3.0 - n**0.5} for n in range(1, 10)], "b"),
        ([{"name": "<i>x</i></script><script>throw 1</script>", "b": b} for b in (1, 2)], "<i>x</i>"),
    ],
    ids=["one axis", "names", "three axes", "zipped", "random search", "hostile"],
)
def test_every_kind_of_axes_is_drawn(
    tmp_path: Path, browse: Callable[[str], Opened], settings: list[dict[str, Any]], expected: str
) -> None:
    results = by_hand(tmp_path / "sweep", settings)
    opened = browse(page(results))
    assert opened.console == []
    assert {"over_axes", "curve_train_loss", "parallel_coordinates"} <= set(opened.figures)
    drawn = Opened(opened.figure("over_axes"), [])
    assert 'class="main-svg"' in drawn.dom
    assert expected in drawn.text
    if len(settings) != 8 and "name" not in settings[0]:
        assert len(re.findall(r'<path class="point"', drawn.dom)) >= len(settings)
    assert len(opened.lines("parallel_coordinates")) == len(settings)


@pytest.mark.parametrize(
    ("direction", "third", "expected"),
    [("maximize", 6, [[51.0, 55.0], [53.0, 57.0]]), ("minimize", 5, [[50.0, 54.0], [52.0, 56.0]])],
)
def test_the_third_axis_stays_where_it_is_best(
    tmp_path: Path, direction: str, third: int, expected: list[list[float]]
) -> None:
    settings = [{"a": a, "b": b, "c": c} for a in (1, 2) for b in (3, 4) for c in (5, 6)]
    heat_map = pictures(by_hand(tmp_path / "sweep", settings, direction=direction))[0]
    assert f"the best setting has them: c={third}." in heat_map.caption
    assert [list(line) for line in heat_map.figure.data[0].z] == expected


def test_values_that_differ_in_a_late_digit_are_different_cells(tmp_path: Path) -> None:
    results = by_hand(tmp_path / "sweep", [{"a": a, "momentum": m} for a in (1, 2) for m in (0.99996, 0.99999)])
    heat_map = pictures(results)[0]
    assert [list(line) for line in heat_map.figure.data[0].z] == [[50.0, 52.0], [51.0, 53.0]]


def test_bright_is_better_whatever_the_direction(tmp_path: Path) -> None:
    settings = [{"a": a, "b": b} for a in (1, 2) for b in (3, 4)]
    for direction in ("maximize", "minimize"):
        results = by_hand(tmp_path / direction, settings, direction=direction)
        colours = [colour for _, colour in pictures(results)[0].figure.data[0].colorscale]
        assert (colours[-1] == "#fde725") == (direction == "maximize")


def test_a_sweep_that_has_not_begun(tmp_path: Path, browse: Callable[[str], Opened]) -> None:
    manifest = new_manifest(tmp_path / "sweep")
    trial = add_trial(manifest, {"lr": 1}, 0)
    opened = browse(page(collect(manifest, {trial.id: state_of(manifest, trial, "pending")})))
    assert opened.console == []
    assert opened.figures == []
    assert "There is nothing to draw yet." in opened.text
    assert "1 trial of 1 setting: 1 pending." in opened.text


def test_gaps_of_values_that_are_not_finite_stay_open(tmp_path: Path, browse: Callable[[str], Opened]) -> None:
    manifest = new_manifest(tmp_path / "sweep")
    losses = [3.0, 2.0, None, 2.0, 1.0]
    trial = add_by_hand(manifest, {"lr": 1}, 0, [{"step": n, "train/loss": loss} for n, loss in enumerate(losses)])
    results = collect(manifest, {trial.id: state_of(manifest, trial, "NaN")})
    opened = browse(page(results))
    assert opened.console == []
    assert len(opened.lines("curve_train_loss")) == 2


@pytest.mark.parametrize("count", [1, 399, 400, 401, 1000, 12345])
def test_long_curves_are_thinned_and_keep_their_end(count: int) -> None:
    points = [(step, float(step)) for step in range(count)]
    kept = thinned(points)
    assert kept[-1] == points[-1]
    assert len(kept) <= MAX_POINTS
    assert kept == sorted(set(kept))
    assert count > MAX_POINTS or kept == points
