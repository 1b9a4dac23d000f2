"""`dino evaluate`, `attend`, `results` and `doctor` at the command line, on a run of seconds."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_line import DINO, finish, metrics, run, spawn, train
from PIL import Image

from dino.analysis.results import collect_results

PROBE = ["evaluation.linear.epochs=3", "evaluation.linear.num_seeds=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, `first` and `second`, of different seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second")):
        done = train(f"run_dir={name}", f"seed={seed}", "evaluation=[knn,linear,rank]", *PROBE, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def dino(*words: str, cwd: Path, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    done = finish(spawn([DINO, *words], cwd=cwd, environment={"COLUMNS": "400", **(environment or {})}))
    return done.returncode, done.stdout, done.stderr


def last(run_dir: Path) -> dict[str, Any]:
    return next(line for line in reversed(metrics(run_dir)) if "val/knn_top1" in line)


# ---------------------------------------------------------------------- evaluate


def test_afterwards_the_numbers_are_those_of_training(runs: Path) -> None:
    code, stdout, stderr = dino("evaluate", "first", "--protocol", "knn,linear,rank", cwd=runs)
    assert code == 0, stderr
    assert "loaded 18 of 18 tensors" in stdout
    (path,) = (runs / "first" / "evaluation").glob("step_00000012/results.json")
    found = json.loads(path.read_text())
    trained = last(runs / "first")
    for name, value in found["metrics"].items():
        assert value == pytest.approx(trained[name], abs=1e-9), name
    assert set(found["seconds"]) == {"knn", "linear", "rank"}
    assert (found["network"], found["step"], found["dataset"]) == ("teacher", 12, "digits")


def test_classes_are_written_and_add_up(runs: Path) -> None:
    content = json.loads((runs / "first" / "evaluation" / "step_00000012" / "knn.json").read_text())
    confusion = np.array(content["confusion"])
    assert confusion.sum(axis=1).tolist() == content["num_images"]
    assert confusion.trace() / confusion.sum() * 100 == pytest.approx(last(runs / "first")["val/knn_top1"])
    assert content["classes"] == [str(digit) for digit in range(10)]
    page = run([DINO, "report", "first"], cwd=runs)
    assert page.returncode == 0, page.stderr
    assert "Which classes are taken for which" in (runs / "first" / "report.html").read_text()


def test_a_run_without_its_config_and_one_without_a_checkpoint_are_named(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "first", tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "config.yaml").unlink()
    code, _, stderr = dino("evaluate", "run", cwd=tmp_path)
    assert (code, "error: run/config.yaml is gone" in stderr) == (2, True), stderr
    named = dino("evaluate", "run/checkpoints/last.pt", "dataset=digits", cwd=tmp_path)
    assert named[0] == 0, named[2]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "this run has saved no checkpoint yet" in dino("evaluate", "run", cwd=tmp_path)[2]


def test_student_other_settings_and_other_data_have_files_of_their_own(runs: Path, tmp_path: Path) -> None:
    for split, count in (("train", 12), ("val", 6)):
        for number in range(count):
            path = tmp_path / "photos" / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20, 20), 200 * (number % 2) + number).save(path)
    words = [
        "dataset=folder",
        f"dataset.root={tmp_path / 'photos'}",
        "dataset.channels=1",
        "evaluation.knn.neighbours=[3]",
    ]
    code, _, stderr = dino("evaluate", "second", *words, cwd=runs)
    assert code == 0, stderr
    assert dino("evaluate", "second", "--network", "student", "--checkpoint", "best", cwd=runs)[0] == 0
    names = {path.name for path in (runs / "second" / "evaluation").iterdir()}
    assert any(name.endswith("_folder_knn.neighbours=3") for name in names)
    assert any(name.endswith("_student") for name in names)


def test_other_settings_of_an_evaluator_do_not_stand_for_the_runs_own(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "first", tmp_path / "run", symlinks=True)
    before = last(tmp_path / "run")["val/knn_top1"]
    code, _, stderr = dino("evaluate", "run", "evaluation.knn.neighbours=[1,200]", cwd=tmp_path)
    assert code == 0, stderr
    assert (tmp_path / "run" / "evaluation" / "step_00000012_knn.neighbours=1,200" / "results.json").is_file()
    assert dino("results", ".", "--csv", "all.csv", cwd=tmp_path)[0] == 0
    with (tmp_path / "all.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["val/knn_top1"]) == before
    assert "val/knn_top1 (knn.neighbours=1,200)" in row


def test_weights_at_another_size_do_not_stand_for_the_runs_own(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "first", tmp_path / "run", symlinks=True)
    assert dino("export", "run", "--format", "timm", "--size", "24", cwd=tmp_path)[0] == 0
    (weights,) = (tmp_path / "run" / "export").glob("*_24.pth")
    code, stdout, stderr = dino("evaluate", str(weights), cwd=tmp_path)
    assert code == 0, stderr
    assert "_evaluation_size=24" in stdout.split("results: ")[1]


def test_the_runs_own_dataset_by_name_is_no_other(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "first", tmp_path / "run", symlinks=True)
    code, stdout, stderr = dino("evaluate", "run", "dataset=digits", cwd=tmp_path)
    assert code == 0, stderr
    assert stdout.rstrip().endswith("run/evaluation/step_00000012/results.json")


def test_results_that_cannot_be_written_are_no_success(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "first", tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "evaluation")
    (tmp_path / "run" / "evaluation").write_text("")
    code, stdout, _ = dino("evaluate", "run", cwd=tmp_path)
    assert code == 1
    assert "results.json is left out: Not a directory" in stdout
    assert "results: " not in stdout


def test_what_cannot_be_measured_is_said(runs: Path, tmp_path: Path) -> None:
    for number in range(3):
        Image.new("L", (20, 20), 60 * number).save(tmp_path / f"{number}.png")
    shutil.copy((runs / "first" / "checkpoints" / "last.pt").resolve(), tmp_path / "mine.pt")
    code, stdout, _ = dino("evaluate", "mine.pt", "dataset.root=.", cwd=tmp_path)
    assert code == 1
    assert "no k-NN: dataset folder has no held-out split" in stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere: there is no such run directory or file (nothing is downloaded)"),
        (["first", "--protocol", "knn,linera"], "--protocol knn,linera: use one or more of "),
        (["first", "--protocol", "pictures"], "--protocol pictures: use one or more of "),
        (["first", "evaluation.knn.neighbors=[5]"], "evaluation.knn.neighbors: there is no such key; did you mean"),
        (["first", "optimizer.lr=1"], "optimizer.lr=1: dino evaluate reads only dataset, evaluation, trainer, seed"),
        (["first", "dataset=cifar10"], "dataset.channels=3: the backbone takes images of 1"),
        (["first", "--checkpoint", "9"], "--checkpoint 9: first has no checkpoint of that step; it has 12"),
    ],
)
def test_bad_words_are_answered_in_one_sentence(runs: Path, words: list[str], says: str) -> None:
    code, stdout, stderr = dino("evaluate", *words, cwd=runs)
    assert code == 2, stdout + stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith(f"error: {says}"), stderr


def test_weights_of_no_run_need_to_be_told_on_what(runs: Path, tmp_path: Path) -> None:
    shutil.copy((runs / "first" / "checkpoints" / "last.pt").resolve(), tmp_path / "mine.pt")
    code, _, stderr = dino("evaluate", "mine.pt", cwd=tmp_path)
    assert code == 2
    assert "dataset.root" in stderr
    code, stdout, stderr = dino(
        "evaluate", "mine.pt", "dataset=digits", "evaluation.knn.pixel_baseline=false", cwd=tmp_path
    )
    assert code == 0, stderr
    assert "val/knn_top1" in stdout


# ---------------------------------------------------------------------- attend


def test_attention_of_a_run_is_drawn(runs: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40), dtype=np.uint8)).save(tmp_path / "photo.png")
    words = [str(runs / "first"), "--image", "photo.png", "--threshold", "0.6"]
    code, stdout, stderr = dino("attend", *words, cwd=tmp_path)
    assert code == 0, stderr
    assert "attention/index.html: all pictures" in stdout
    assert (tmp_path / "attention" / "photo" / "mask_head1.png").is_file()
    code, stdout, _ = dino("attend", *words, "--untrained", "--output", "fresh", cwd=tmp_path)
    assert code == 0
    assert "freshly initialised" in stdout
    page = (tmp_path / "fresh" / "index.html").read_text()
    assert "untrained" in page
    assert "loaded 18" not in page
    first, fresh = (
        (tmp_path / folder / "photo" / "attention_mean.png").read_bytes() for folder in ("attention", "fresh")
    )
    assert first != fresh
    code, _, stderr = dino("attend", *words[:2], "nothing.png", cwd=tmp_path)
    assert code == 2
    assert stderr == "error: --image nothing.png: there is no such file or folder\n"


def test_images_that_cannot_be_looked_at(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("L", (20, 20), 100).save(tmp_path / "photos" / "good.png")
    (tmp_path / "photos" / "broken.png").write_text("not an image")
    words = ["attend", str(runs / "first"), "--image"]
    code, _, stderr = dino(*words, "photos", cwd=tmp_path)
    assert code == 0, stderr
    assert "broken.png cannot be read as an image (PIL does not know its format)" in stderr
    assert (tmp_path / "attention" / "index.html").is_file()
    assert dino(*words, "photos/broken.png", cwd=tmp_path)[0] == 2
    Image.new("L", (30_000, 1), 100).save(tmp_path / "flat.png")
    code, _, stderr = dino(*words, "flat.png", cwd=tmp_path)
    assert code == 2
    assert stderr.startswith("error: --size 32: flat has 8 x 240000 patches then, whose attention takes "), stderr


# ---------------------------------------------------------------------- results


def test_one_table_over_all_runs(runs: Path) -> None:
    code, stdout, stderr = dino("results", ".", "--sort", "val/knn_top1", "--csv", "all.csv", cwd=runs)
    assert code == 0, stderr
    assert "2 runs in ." in stdout
    with (runs / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {"first", "second"}
    assert {row["seed"] for row in rows} == {"0", "1"}
    assert {row["state"] for row in rows} == {"finished"}
    accuracies = [float(row["val/knn_top1"]) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    assert [float(row["val/knn_top1"]) for row in rows] == [last(runs / row["run"])["val/knn_top1"] for row in rows]
    assert "loss.teacher_temp" not in rows[0]  # they are the same there


def test_a_narrow_terminal_shows_what_was_typed(runs: Path, tmp_path: Path) -> None:
    for name, word in (("one", "backbone.depth=1"), ("two", "head.out_dim=128")):
        shutil.copytree(runs / "first", tmp_path / name, symlinks=True)
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        config["dataset"] |= {f"setting_{number}": name for number in range(30)}  # what follows from what was typed
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / name / ".hydra" / "overrides.yaml").write_text(
            yaml.safe_dump([word, "dataset.setting_7=x", "~logger"])
        )
    code, stdout, stderr = dino("results", ".", cwd=tmp_path, environment={"COLUMNS": "110"})
    assert code == 0, stderr
    assert stdout.count("finished") == 2
    assert "columns that are left out here: " in stdout
    shown = collect_results(tmp_path).abridged(8)
    assert shown[:5] == ["run", "state", "step", "time_s", "dataset.setting_7"]
    assert "val/knn_top1" in shown
    assert not any("logger" in name for name in collect_results(tmp_path).columns)
    assert "dataset.setting_9" in collect_results(tmp_path, sort="dataset.setting_9").abridged(8)


def test_results_name_what_is_not_there(runs: Path, tmp_path: Path) -> None:
    assert dino("results", str(tmp_path), cwd=runs)[2].startswith(f"error: {tmp_path}: no run is in it")
    assert "did you mean val/knn_top1" in dino("results", ".", "--sort", "val/kn_top1", cwd=runs)[2]
    assert "one of run, state, step, time_s, val/knn_top1" in dino("results", ".", "--sort", "foo", cwd=runs)[2]
    assert "--metric val/knn_tpo1: no run has it" in dino("results", ".", "--metric", "val/knn_tpo1", cwd=runs)[2]


def test_damaged_runs_are_in_the_table(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "first", tmp_path / "deep" / "first", symlinks=True)
    (tmp_path / "deep" / "first" / "metrics.jsonl").write_text("{half a line")
    code, stdout, stderr = dino("results", str(tmp_path), "--csv", "all.csv", cwd=tmp_path)
    assert code == 0, stdout + stderr
    assert "deep/first" in stdout


# ---------------------------------------------------------------------- doctor


@pytest.fixture
def bare_machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine that has git, and neither Slurm nor a GPU nor a login to wandb."""
    folder = tmp_path_factory.mktemp("bare")
    git = shutil.which("git")
    assert git is not None
    (folder / "git").symlink_to(git)
    return {"PATH": str(folder), "HOME": str(folder), "WANDB_API_KEY": "", "WANDB_MODE": ""}


def test_the_doctor_looks_at_everything_without_gpu_slurm_and_wandb_login(
    bare_machine: dict[str, str], tmp_path: Path
) -> None:
    code, stdout, stderr = dino("doctor", cwd=tmp_path, environment=bare_machine)
    assert code == 0, stdout + stderr
    for word in ("python", "torch", "cores", "memory", "disk", "Slurm", "none here (no sbatch)", "wandb login", "data"):
        assert word in stdout, word
    assert "1,437 training images, 360 held out" in stdout
    assert stdout.rstrip().endswith("nothing is wrong")


def test_the_doctor_says_what_is_wrong_and_how_to_mend_it(bare_machine: dict[str, str], tmp_path: Path) -> None:
    code, stdout, _ = dino(
        "doctor",
        "dataset=folder",
        f"dataset.root={tmp_path}/none",
        "trainer.device=cuda:7",
        "dataset.num_workers=0",
        "logger=wandb",
        cwd=tmp_path,
        environment=bare_machine,
    )
    assert code == 1
    assert "torch sees no CUDA device here; use auto or cpu" in stdout
    assert f"{tmp_path}/none" in stdout
    assert "wandb login, or WANDB_MODE=offline" in stdout
    assert "wrong: 3" in stdout
    assert os.listdir(tmp_path) == []  # it leaves nothing behind


@pytest.mark.skipif(
    not shutil.which("sinfo") or Path("/etc/slurm/slurm.conf").exists(),
    reason="needs Slurm's commands without a cluster",
)
def test_slurm_commands_without_a_cluster_are_nothing_wrong(
    bare_machine: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_CONF", raising=False)  # of the cluster that other tests start
    links = [Path(bare_machine["PATH"]) / name for name in ("sbatch", "sinfo")]
    for link in links:
        link.symlink_to(str(shutil.which(link.name)))
    try:
        code, stdout, stderr = dino("doctor", cwd=tmp_path, environment=bare_machine)
    finally:
        for link in links:
            link.unlink()
    assert code == 0, stdout + stderr
    assert "no cluster is configured" in stdout


def test_what_breaks_the_doctor_is_a_finding(bare_machine: dict[str, str], tmp_path: Path) -> None:
    sbatch = Path(bare_machine["PATH"]) / "sbatch"  # without sinfo beside it
    sbatch.write_text("#!/bin/sh\n")
    sbatch.chmod(0o755)
    try:
        code, stdout, stderr = dino("doctor", cwd=tmp_path, environment=bare_machine)
    finally:
        sbatch.unlink()
    assert code == 1
    assert "FileNotFoundError" in stdout
    assert "1,437 training images" in stdout
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(runs: Path, tmp_path: Path) -> None:
    found = []
    for name, words in (("one", [DINO]), ("two", ["torchrun", "--no-python", "--nproc-per-node", "2", DINO])):
        shutil.copytree(runs / "first", tmp_path / name, symlinks=True)
        program = [str(Path(sys.executable).with_name(words[0])), *words[1:]] if words[0] == "torchrun" else words
        done = run([*program, "evaluate", name, "--protocol", "knn,linear,rank"], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("results: ") == 1
        found.append(json.loads((tmp_path / name / "evaluation" / "step_00000012" / "results.json").read_text()))
    assert found[0]["metrics"] == pytest.approx(found[1]["metrics"], abs=1e-6)
