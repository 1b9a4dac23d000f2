"""From axes to points, and from a command line to frozen trials beside a copy of the code."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import REPOSITORY, TINY, run
from omegaconf import OmegaConf

from dino.config import compose, fingerprint
from dino.messages import ConfigError
from dino.sweep.freeze import plan, read_request
from dino.sweep.manifest import Manifest
from dino.sweep.plan import Sweep, points_of
from dino.sweep.snapshot import digest, take_snapshot


def points(**settings: object) -> list[tuple[str, ...]]:
    return [point.overrides for point in points_of(Sweep(name="a", dir="b", **settings))]  # type: ignore[arg-type]


def test_a_grid_has_every_combination_once_for_each_seed() -> None:
    found = points(axes=["loss.teacher_temp=0.04,0.07", "ema.momentum=range(0.9,1.0,0.05)"], seeds=[0, 5])
    assert found[:2] == [
        ("loss.teacher_temp=0.04", "ema.momentum=0.9", "seed=0"),
        ("loss.teacher_temp=0.04", "ema.momentum=0.9", "seed=5"),
    ]
    assert len(found) == len(set(found)) == 2 * 2 * 2


def test_zipped_axes_vary_together() -> None:
    found = points(
        axes=["backbone=vit_s16,resnet50"], zipped=[["dataset.batch_size=16,32", "optimizer.lr=0.001,0.002"]]
    )
    assert [point[:3] for point in found] == [
        ("backbone=vit_s16", "dataset.batch_size=16", "optimizer.lr=0.001"),
        ("backbone=vit_s16", "dataset.batch_size=32", "optimizer.lr=0.002"),
        ("backbone=resnet50", "dataset.batch_size=16", "optimizer.lr=0.001"),
        ("backbone=resnet50", "dataset.batch_size=32", "optimizer.lr=0.002"),
    ]


def test_a_random_search_draws_from_intervals_and_repeats_itself() -> None:
    axes = [
        "optimizer.lr=tag(log,interval(0.0001,0.1))",
        "loss.teacher_temp=0.04,0.07",
        "head.out_dim=int(interval(64,96))",
    ]
    found = points_of(Sweep(name="a", dir="b", axes=axes, search="random", num_trials=200))
    rates = [point.settings["optimizer.lr"] for point in found]
    assert len(found) == 200
    assert min(rates) >= 0.0001
    assert max(rates) <= 0.1
    below = sum(rate < math.sqrt(0.0001 * 0.1) for rate in rates)  # half of them, in the logarithm
    assert 70 < below < 130
    assert all(isinstance(point.settings["head.out_dim"], int) for point in found)
    assert found == points_of(Sweep(name="a", dir="b", axes=axes, search="random", num_trials=200))
    assert found != points_of(Sweep(name="a", dir="b", axes=axes, search="random", num_trials=200, search_seed=1))


def test_a_random_search_of_a_grid_takes_no_point_twice() -> None:
    found = points(axes=["loss.teacher_temp=0.04,0.05,0.07"], search="random", num_trials=10)
    assert len(found) == len(set(found)) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"axes": ["loss.teacher_temp=0.04,0.07", "loss.teacher_temp=1,2"]}, "loss.teacher_temp: this axis is there"),
        ({"axes": ["seed=1,2"]}, "sweep.seeds=[0,1,2]"),
        ({"axes": ["ema.momentum=interval(0.9,1)"]}, "an interval is for sweep.search=random or optuna"),
        ({"axes": ["ema.momentum=interval(1,0.9)"]}, "an interval goes from the smaller to the larger number"),
        ({"axes": ["optimizer.lr"]}, "write a setting as key=value"),
        ({"axes": ["~loss.teacher_temp"]}, "this cannot be an axis"),
        ({"zipped": [["a=1,2", "b=1,2,3"]]}, "have [2,3] values"),
        ({"axes": ["a=1,2"], "zipped": [["a=1,2", "b=1,2"]]}, "a: this axis is there twice"),
        ({"seeds": [1, 1]}, "sweep.seeds=[1,1]: list different whole numbers"),
        ({"on_failure": "retry"}, "sweep.on_failure=retry: use continue, stop or retry:k"),
        ({"search": "random"}, "sweep.num_trials=20"),
        ({"num_trials": 3}, "a grid has all its points"),
        ({"search": "optuna", "num_trials": 3, "seeds": [0, 1]}, "takes one seed"),
        (
            {"search": "random", "num_trials": 2, "axes": ["a=tag(log,interval(0,1))"]},
            "a logarithmic interval starts above 0",
        ),
    ],
)
def test_what_cannot_be_a_sweep_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        points(**settings)
    assert said in str(refused.value)


def test_what_is_typed_wins_over_the_sweep() -> None:
    request = read_request(["sweep=quickstart", "ema.momentum=0.9", "optimizer.lr=1,2", "trainer.epochs=3"])
    assert request.sweep.axes == ["loss.teacher_temp=0.02,0.04", "optimizer.lr=1,2"]
    assert request.base[-2:] == ["ema.momentum=0.9", "trainer.epochs=3"]
    assert request.cluster["_target_"].endswith("LocalCluster")


# ---------------------------------------------------------------------- frozen trials


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.chdir(tmp_path)
    manifest, _ = plan([*TINY, "sweep.dir=s", "sweep.seeds=[0,1]", "loss.teacher_temp=0.03,0.04"])
    return manifest


def test_a_trial_is_its_config_and_names_its_fingerprint(planned: Manifest) -> None:
    assert [trial.settings for trial in planned.trials] == [{"loss.teacher_temp": t} for t in (0.03, 0.03, 0.04, 0.04)]
    assert [trial.seed for trial in planned.trials] == [0, 1, 0, 1]
    for trial in planned.trials:
        frozen = OmegaConf.load(planned.directory(trial) / "config.yaml")
        assert frozen.fingerprint == trial.fingerprint == fingerprint(compose(trial.overrides))
        assert trial.id.endswith(trial.fingerprint[:8])
        assert frozen.run_dir == str(planned.directory(trial))
        assert "${" not in (planned.directory(trial) / "config.yaml").read_text()
    assert Manifest.read(planned.folder).trials == planned.trials


def test_the_code_is_copied_and_knows_its_commit(planned: Manifest) -> None:
    (snapshot,) = planned.snapshots
    code = planned.folder / snapshot.folder
    for name in ("train.py", "conf/train.yaml", "src/dino/config.py", "tests/command_line.py"):
        assert (code / name).read_bytes() == (REPOSITORY / name).read_bytes()
    assert not (code / ".venv").exists()
    assert digest(code) == snapshot.digest
    says = "from dino.runtime import provenance; print(provenance()['commit'])"
    words = [sys.executable, "-c", says]
    told = subprocess.run(words, env={"PYTHONPATH": str(code / "src")}, capture_output=True, text=True, cwd=code)
    assert told.stdout.strip() == snapshot.commit
    assert take_snapshot(planned) == 0  # the same code is copied once
    (code / "train.py").write_text("changed")
    assert digest(code) != snapshot.digest


def test_code_that_differs_gets_a_copy_of_its_own(planned: Manifest, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.py").write_text("1")
    (source / "outputs").mkdir()
    (source / "outputs" / "big").write_text("not code")
    assert take_snapshot(planned, source) == 1
    assert (planned.folder / "code_2" / "train.py").read_text() == "1"
    assert not (planned.folder / "code_2" / "outputs").exists()
    (source / "train.py").write_text("2")
    assert take_snapshot(planned, source) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.teacher_temp=0.04,-1"], "loss.teacher_temp=-1: use a number above 0"),
        (["loss.teacher_tmp=0.04,0.05"], "did you mean loss.teacher_temp?"),
        (["backbone=vit_s16,vit_x"], "backbone=vit_x: no such option"),
        (["loss.teacher_temp=0.04,0.04"], "are the same training"),
        (["trainer.max_steps=3,4"], "vary settings that change results"),
        (["sweep.seeds=0,1"], "a list: 'sweep.seeds=[0,1]'"),
        (["seed=3"], "write sweep.seeds=[3]"),
        (
            ["ema.momentum=1", "sweep.zipped=[['ema.momentum=0.9,1']]"],
            "ema.momentum: sweep.zipped=[ema.momentum=0.9,1] varies it",
        ),
        (["run_dir=x"], "every trial has a directory of its own"),
        (["hydra/launcher=slurm"], "choose cluster=..."),
        (["sweep=temperatures"], "sweep=temperatures: no such option; there are"),
        (["cluster=slurm", "cluster.mem_gb=-3"], "cluster.mem_gb=-3: use a number above 0 or null"),
        (["cluster=slum"], "cluster=slum: no such option"),
        (["sweep.direction=up"], "sweep.direction=up: use maximize or minimize"),
        (["sweep.axis=[a]"], "sweep.axis: there is no such key; did you mean sweep.axes?"),
        (["loss._target_=os.system"], "only names in dino., torch., torchvision., timm. are built"),
    ],
)
def test_a_bad_sweep_is_refused_at_the_command_line_and_leaves_nothing(
    words: list[str], said: str, tmp_path: Path
) -> None:
    result = run([sys.executable, str(REPOSITORY / "sweep.py"), "submit", *words], cwd=tmp_path)
    assert result.returncode == 2, result
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == [] or list((tmp_path / "outputs/sweeps").iterdir()) == []


def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for content in (None, "{", json.dumps({"name": "x"})):
        if content is not None:
            (tmp_path / "manifest.json").write_text(content)
        result = run([sys.executable, str(REPOSITORY / "sweep.py"), "status", str(tmp_path)], cwd=tmp_path)
        assert result.returncode == 2, result
        assert str(tmp_path) in result.stderr
        assert "Traceback" not in result.stderr
