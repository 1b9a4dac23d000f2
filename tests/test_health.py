"""A run that does not learn, at the real command line: it says so, and ends if it was told to."""

import json
from pathlib import Path

import pytest
from command_line import finish, last_state, metrics, start_ranks, status, train

COLLAPSING = [  # without centering every output becomes the same
    *("run_dir=run", "loss.center_momentum=1", "loss.koleo_weight=0", "schedule.lr.warmup_epochs=0"),
    *("trainer.freeze_last_layer_epochs=0", "trainer.epochs=8", "monitor.health.patience_steps=10", "evaluation=[]"),
]


def test_a_collapse_is_said_and_written_down(tmp_path: Path) -> None:
    result = train(*COLLAPSING, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "constant_collapse at step" in result.stdout
    assert "loss.center_momentum=1: try 0.9 (a center that follows" in result.stdout
    assert "health      found constant_collapse" in result.stdout
    (event,) = [line for line in metrics(tmp_path / "run") if line.get("verdict") == "constant_collapse"]
    assert event["event"] == "verdict"
    assert event["severe"] is True
    assert event["evidence"]["train/mutual_information"] < 0.05
    assert "constant collapse" in (tmp_path / "run" / "train.log").read_text()
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["verdicts"]["constant_collapse"] > 1


def test_a_run_that_unlearns_says_so_at_its_end(tmp_path: Path) -> None:
    short = ("trainer.epochs=1", "schedule.lr.warmup_epochs=0", "trainer.limit_steps_per_epoch=16")
    result = train("run_dir=run", *short, "optimizer.lr=3", "ema.momentum=0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (words,) = [line for line in result.stdout.splitlines() if line.startswith("health")]
    assert words.endswith("; k-NN is below that of the untrained network")


def test_a_run_that_is_to_stop_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    result = train(*COLLAPSING, "monitor.on_collapse=stop", cwd=tmp_path)
    assert result.returncode == 4
    record = status(tmp_path / "run")
    assert (record["state"], record["exit_code"]) == ("failed", 4)
    assert "constant collapse, for 10 steps. loss.center_momentum=1: try 0.9" in record["reason"]
    assert last_state(tmp_path / "run")["step"] == record["step"] < 48
    assert metrics(tmp_path / "run")[-1]["event"] == "verdict"


def test_a_collapsed_run_leaves_a_report_that_says_so(tmp_path: Path) -> None:
    result = train(*COLLAPSING, "monitor.on_collapse=stop", "monitor.report=true", cwd=tmp_path)
    assert result.returncode == 4
    assert "report      " in result.stdout
    assert "It has collapsed" in (tmp_path / "run" / "report.html").read_text()


def test_all_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    ranks = start_ranks(2, *COLLAPSING, "monitor.on_collapse=stop", cwd=tmp_path)
    results = [finish(process) for process in ranks]
    assert [result.returncode for result in results] == [4, 4], [result.stderr for result in results]
    reason = status(tmp_path / "run")["reason"]
    assert reason.startswith("step ")
    assert "constant collapse" in reason
    assert last_state(tmp_path / "run")["step"] == status(tmp_path / "run")["step"]
    assert (tmp_path / "run" / "train.log").read_text().count("constant_collapse at step") == 1


def test_ranks_agree_on_a_metric_that_differs_between_them(tmp_path: Path) -> None:
    """How long a rank waits for its data is its own: what rank 0 measured counts for all."""
    ranks = start_ranks(
        *(2, "run_dir=run", "trainer.epochs=6", "evaluation=[]", "dataset.batch_size=32"),
        *("monitor.early_stopping.metric=perf/data_wait_s", "monitor.early_stopping.mode=min"),
        "monitor.early_stopping.patience=2",
        cwd=tmp_path,
    )
    results = [finish(process, timeout=120) for process in ranks]
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]


def test_expected_moves_are_marked_at_their_steps(tmp_path: Path) -> None:
    """6 steps an epoch: the last layer is frozen for 1, the learning rate warms up for 2, the temperature for 3."""
    result = train(
        *("run_dir=run", "trainer.epochs=4", "schedule.lr.warmup_epochs=2", "loss.warmup_teacher_temp_epochs=3"),
        *("loss.warmup_teacher_temp=0.01", "evaluation=[]", "monitor.every_steps=3"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    events = [line for line in metrics(tmp_path / "run") if line.get("event") == "expected_move"]
    assert [(line["step"], line["cause"]) for line in events] == [
        (6, "last_layer_unfrozen"),
        (11, "lr_peak"),
        (12, "teacher_temp_warmup_end"),
    ]
    assert "loss is expected to move at step 6 (last layer unfrozen), 11 (lr peak), 12 (teacher temp" in result.stdout


def test_a_run_without_labels_says_how_good_its_features_are(tmp_path: Path) -> None:
    """Nothing but images: no k-NN, but effective rank, spread, view retrieval and the split of the loss."""
    images = tmp_path / "images"
    images.mkdir()
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(images / f"{number:02d}.png")
    result = train(
        *("run_dir=run", "dataset=folder", f"dataset.root={images}", "dataset.global_size=16", "dataset.local_size=8"),
        *("dataset.evaluation_resize=16", "dataset.evaluation_size=16", "backbone=vit_micro4"),
        *("dataset.batch_size=20", "dataset.num_workers=0"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    names = {name for line in metrics(tmp_path / "run") for name in line}
    assert names >= {"val/effective_rank", "val/feature_std", "val/view_retrieval_top1", "train/kl_teacher_student"}
    assert names >= {"train/loss_uniform", "train/mutual_information"}
    assert "val/knn_top1" not in names


@pytest.mark.parametrize("metric", ["train/entropy_techer", "grad/nothing/norm"])
def test_a_metric_that_no_step_has_is_refused_at_the_first_step(tmp_path: Path, metric: str) -> None:
    result = train(
        *("run_dir=run", f"monitor.early_stopping.metric={metric}", "monitor.early_stopping.mode=max"), cwd=tmp_path
    )
    assert result.returncode == 2
    assert f"monitor.early_stopping.metric={metric}: logged steps have no such metric" in result.stdout + result.stderr
    assert status(tmp_path / "run")["step"] == 1
