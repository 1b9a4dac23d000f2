"""`dino report`: of runs in every state, on the terminal and as a page in a real browser."""

import json
import re
import shutil
import signal
from pathlib import Path

import browser
import pytest
from browser import Opened
from command_line import DINO, finish, metrics, run, start, train, wait_until
from handmade_run import add_pictures, expected_move, healthy, run_directory, verdict
from PIL import Image

from dino.analysis import History, analyse, write_report
from dino.analysis.report import page

MAX_BYTES = 5_000_000
HOSTILE = "</script><script>throw new Error('escaped badly')</script><b>bold</b> & <img src=http://localhost:1/x.png>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def real(folder: Path) -> Path:
    """The directory of a real run that has finished."""
    run_dir = folder / "real"
    every_epoch = [f"evaluation.{name}.every_epochs=1" for name in ("knn", "validation_loss", "label_free")]
    done = train(f"run_dir={run_dir}", *every_epoch, cwd=folder)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def collapsed(folder: Path) -> Path:
    """A run by hand in which everything there is to draw has happened."""
    events = [expected_move(100), {"step": 150, "event": "skipped_step", "text": "the loss was not finite"}]
    events += [verdict(300, "uniform_collapse", severe=True, text=f"collapse {HOSTILE}")]
    events += [verdict(500, "plateau", severe=False, text="level since step 300; lower optimizer.lr (0.024 -> 0.012)")]
    changes = {"val/knn_top1": lambda step: 46.7 - step / 100}
    config = {"loss": {"teacher_temp": 1.0}}
    run_dir = run_directory(folder / "collapsed", events=events, changes=changes, config=config)
    add_pictures(run_dir, [0, 250, 500, 750, 1000], size=700)
    return run_dir


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    return run_directory(folder / "other", steps=600, state="preempted", reason="SIGTERM")


@pytest.fixture(scope="module")
def opened(folder: Path, collapsed: Path) -> Opened:
    return opened_report([collapsed], folder / "one.html")


@pytest.fixture(scope="module")
def together(folder: Path, collapsed: Path, other: Path) -> Opened:
    return opened_report([collapsed, other], folder / "two.html")


def opened_report(runs: list[Path], path: Path) -> Opened:
    write_report(runs, path)
    assert path.stat().st_size < MAX_BYTES
    return browser.browse(path)


def dino_report(*words: str | Path, cwd: Path) -> tuple[int, str, str]:
    done = run([DINO, "report", *map(str, words)], cwd=cwd)
    return done.returncode, " ".join(done.stdout.split()), done.stderr


# ---------------------------------------------------------------------- the command, on real runs


def test_a_finished_run(real: Path, folder: Path) -> None:
    code, words, errors = dino_report(real, cwd=folder)
    assert (code, errors) == (0, "")
    assert "It has finished at step 12 of 12." in words
    assert "k-NN" in words
    assert "health score" in words
    assert str(real / "report.html") in words.replace(" ", "")
    pictures = {path.stem for path in (real / "plots").glob("*.png")}
    assert {"loss", "knn", "center_norm", "grad_norm", "lr", "images_per_s"} <= pictures
    for path in (real / "plots").glob("*.png"):
        Image.open(path).verify()
    opened = browser.browse(real / "report.html")
    assert opened.console == []
    assert set(opened.figures) == pictures
    assert len(opened.lines("center_norm")) == 1
    assert "Differences from python train.py dataset=digits" in opened.text
    assert "backbone.depth: 2 -> 1" in opened.text, "the config's difference from where it came from"
    assert json.loads((real / "status.json").read_text())["commit"] in opened.text


@pytest.mark.slow
def test_a_run_that_goes_on_and_is_then_killed(folder: Path) -> None:
    run_dir = folder / "killed"
    process = start(f"run_dir={run_dir}", "trainer.epochs=2000", cwd=folder)
    path = run_dir / "metrics.jsonl"
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") > 20, process)
    code, words, _ = dino_report(run_dir, "--output", folder / "going_on.html", cwd=folder)
    assert process.poll() is None, "it is not disturbed"
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert code == 0
    assert "It is running, at step" in words
    code, words, _ = dino_report(run_dir, "--output", folder / "killed.html", cwd=folder)
    assert code == 0
    assert "It died without a word at step" in words
    opened = browser.browse(folder / "going_on.html")
    assert opened.console == []
    assert len(opened.lines("loss")) >= 1


@pytest.mark.parametrize("kept", ["status.json", "config.yaml"])
def test_a_run_without_a_single_metric(tmp_path: Path, kept: str) -> None:
    run_dir = run_directory(tmp_path / "run", steps=0, state="created")
    for path in run_dir.iterdir():
        if path.name != kept:
            path.unlink()
    code, words, _ = dino_report(run_dir, cwd=tmp_path)
    assert code == 0
    assert "Whether it learns is not yet known" in words
    opened = browser.browse(run_dir / "report.html")
    assert opened.console == []
    assert opened.figures == []
    assert "There is nothing to draw yet." in opened.text


def test_what_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    code, words, errors = dino_report(tmp_path, cwd=tmp_path)
    assert code == 2
    assert words == ""
    assert errors.startswith(f"error: {tmp_path}: not the directory of a run")
    assert len(errors.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_one_sentence(real: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, errors = dino_report(real, "--output", tmp_path / "file" / "report.html", cwd=tmp_path)
    assert code == 1
    assert "cannot be written" in errors
    assert "Traceback" not in errors


# ---------------------------------------------------------------------- the page


def test_it_opens_without_a_word_on_the_console(opened: Opened) -> None:
    assert opened.console == []


def test_everything_is_drawn(opened: Opened) -> None:
    named = {"knn", "label_free", "loss", "loss_components", "cross_entropy", "entropy", "confidence", "agreement"}
    named |= {"prototypes", "center_norm", "grad_norm", "grad_groups", "lr", "teacher_temp", "images_per_s", "memory"}
    named |= {"step_time", "correlations", "distribution_entropy", "distribution_max_probability"}
    named |= {"distribution_concentration"}
    assert named <= set(opened.figures)
    for name in opened.figures:
        assert 'class="main-svg"' in opened.figure(name), name
    assert len(opened.lines("cross_entropy")) == 3
    assert len(opened.lines("loss")) == 3, "training, validation and ln K"
    assert len(opened.lines("knn")) == 4, "k-NN, view retrieval, raw pixels and untrained"
    assert len(opened.lines("distribution_entropy")) == 8, "teacher and student at four steps"
    assert re.search(r'<g class="hm">\s*<image', opened.figure("grad_groups"))


def test_what_happened_is_on_the_time_axis(opened: Opened) -> None:
    for name in ("loss", "knn", "center_norm"):
        drawn = opened.figure(name)
        marks = re.findall(r'<path[^>]*data-index="\d+"[^>]*stroke: rgb\((\d+, \d+, \d+)\)', drawn)
        assert sorted(marks) == sorted(["192, 0, 0", "230, 159, 0", "123, 50, 148", "136, 136, 136"])


def test_words_come_before_curves(opened: Opened) -> None:
    order = ["It has collapsed", "Health score", "Verdicts", "Recommendations", "Does it learn?", "Gradients"]
    order += ["Speed and memory", "Distributions", "Pictures", "What stands out", "Numbers", "What moves together"]
    places = [opened.text.index(words) for words in [*order, "Settings", "Provenance"]]
    assert places == sorted(places)
    assert "loss.teacher_temp=1.0: try 0.5" in opened.text
    assert "loss.teacher_temp: 0.02 -> 1.0" in opened.text, "beside dataset=digits as it is"


def test_pictures_are_inside_the_file_and_fit(opened: Opened) -> None:
    kinds = re.findall(r'<img src="data:image/(\w+);base64,', opened.dom)
    assert len(kinds) == 1 + 2 * 4, "the views; attention and neighbours at four of five steps"
    assert "attention of the teacher, step 1000" in opened.text


def test_whatever_comes_from_outside_is_text(opened: Opened) -> None:
    assert "collapse </script>" in opened.text
    assert "<b>bold</b>" not in opened.dom
    assert "<script>throw" not in opened.dom


def test_several_runs_are_overlaid(together: Opened) -> None:
    assert together.console == []
    for name in ("center_norm", "prototypes", "grad_norm", "images_per_s"):
        assert len(together.lines(name)) == 2, name
    assert {"grad_groups_0", "grad_groups_1", "step_time_0", "step_time_1"} <= set(together.figures)
    assert "It was preempted at step 600 of 1000: SIGTERM" in together.text
    compared = together.text[together.text.index("Settings that differ") :]
    assert "loss.teacher_temp 1.0 0.04" in compared[:200]


@pytest.mark.slow
def test_many_long_runs_fit(folder: Path) -> None:
    """Eight runs of a thousand logged steps, with pictures."""
    first = run_directory(folder / "many_0", every=1)
    add_pictures(first, [0, 500, 1000], size=700)
    runs = [first, *(folder / f"many_{place}" for place in range(1, 8))]
    for run_dir in runs[1:]:
        shutil.copytree(first, run_dir)
    path = folder / "many.html"
    path.write_text(page([analyse(History.load(run_dir)) for run_dir in runs]))
    assert path.stat().st_size < MAX_BYTES
    opened = browser.browse(path)
    assert opened.console == []
    assert len(opened.lines("center_norm")) == 8


@pytest.mark.parametrize("name", [HOSTILE.replace("/", "_"), "$x_1$ <i>"], ids=["html", "formula"])
def test_odd_names_are_names(tmp_path: Path, name: str) -> None:
    runs = [run_directory(tmp_path / each, steps=100) for each in (name, "plain")]
    opened = opened_report(runs, tmp_path / "report.html")
    assert opened.console == []
    assert name in opened.text
    assert "<i>" not in opened.dom
    assert (runs[0] / "plots" / "loss.png").exists()


def test_spikes_stay_in_a_long_curve(tmp_path: Path) -> None:
    loss = {"train/loss": lambda step: 77.0 if step == 501 else healthy(step)["train/loss"]}
    content = page([analyse(History.load(run_directory(tmp_path / "run", every=1, changes=loss)))])
    figures = re.findall(r'<script type="application/json" class="figure">(.*?)</script>', content)
    drawn = next(json.loads(each) for each in figures if '"ln K' in each)["data"][0]
    assert len(drawn["x"]) <= 401
    assert (501, 77) in zip(drawn["x"], drawn["y"], strict=True)


def test_the_plan_of_a_running_run_goes_to_its_end(real: Path, tmp_path: Path) -> None:
    """Of a real config, cut off in the middle."""
    run_dir = tmp_path / "run"
    shutil.copytree(real, run_dir, ignore=shutil.ignore_patterns("checkpoints"))
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 6]
    (run_dir / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    content = page([analyse(History.load(run_dir))])
    figures = re.findall(r'<script type="application/json" class="figure">(.*?)</script><div id="(\w+)"', content)
    trained, planned = json.loads(next(drawn for drawn, name in figures if name == "lr"))["data"][:2]
    assert (trained["x"][-1], planned["x"][-1]) == (6, 12)
    rates = {line["step"]: line["train/lr"] for line in metrics(real) if "train/lr" in line}
    assert planned["y"] == pytest.approx([rates[step] for step in planned["x"]], rel=1e-4, abs=1e-9)
