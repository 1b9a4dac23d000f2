"""Every verdict, provoked by a real training run on the digits; runs that learn have none."""

import contextlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import REPOSITORY, metrics

from dino.monitor import Health
from dino.monitor.health import Facts
from dino.run import CollapseError, NonFiniteError, Run
from dino.training import assemble
from dino.validation import checked

SMALL = [
    *("backbone.depth=1", "backbone.embed_dim=32", "backbone.num_heads=2"),
    *("head.hidden_dim=32", "head.bottleneck_dim=16", "head.out_dim=64"),
    *("augmentation.num_local_views=2", "loss.koleo_weight=0", "trainer.freeze_last_layer_epochs=0"),
    *(
        "schedule.lr.warmup_epochs=0",
        "trainer.epochs=20",
        "trainer.max_steps=200",
        "trainer.num_threads=1",
        "trainer.precision=fp32",
    ),
    *("evaluation=[label_free]", "evaluation.label_free.every_epochs=2", "monitor.every_steps=5"),
    *("monitor.health.patience_steps=60", "~logger.console"),
]
NO_CLIPPING = ("trainer.clip_norm=null", "head.norm_last_layer=false")
QUICKSTART = [
    *("backbone.depth=2", "backbone.embed_dim=64", "backbone.num_heads=4", "head.hidden_dim=256"),
    *("head.bottleneck_dim=64", "head.out_dim=256", "augmentation.num_local_views=4", "loss.koleo_weight=0.2"),
    *("trainer.freeze_last_layer_epochs=1", "schedule.lr.warmup_epochs=9", "trainer.epochs=90"),
]

Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Trains with overrides of a small run."""
    return lambda *overrides: events_of(tmp_path, *SMALL, *overrides)


def events_of(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Trains in this process; the events of its metrics.jsonl."""
    config, _ = checked(overrides)
    run = Run(folder / "run", {})
    logging.getLogger("dino").setLevel(logging.ERROR)
    trainer = assemble(config, run)
    run.directory.mkdir(exist_ok=True)
    with contextlib.suppress(NonFiniteError):
        trainer.fit()
    return [line for line in metrics(run.directory) if "event" in line]


def verdicts(events: list[dict[str, Any]]) -> list[str]:
    return [event["verdict"] for event in events if event["event"] == "verdict"]


# The first that is found, what provokes it, and the key that its advice names. Momentum 1 keeps the teacher, and with
# it the targets, as they are: then it is the student alone that goes wrong.
PROVOKED = {
    "uniform_collapse": (
        ["loss.center_momentum=1", "loss.teacher_temp=1", "loss.warmup_teacher_temp=1"],
        "loss.teacher_temp=1: try 0.5",
    ),
    "constant_collapse": (["loss.center_momentum=1"], "loss.center_momentum=1: try 0.9"),
    "entropy_collapse": (
        ["loss.teacher_temp=1e-6", "loss.warmup_teacher_temp=1e-6", "ema.momentum=1"],
        "loss.teacher_temp=1e-06: try 2e-06",
    ),
    "center_explosion": (["optimizer=sgd", "optimizer.lr=1000", *NO_CLIPPING], "head.norm_last_layer=false: try true"),
    "loss_explosion": (
        ["optimizer=sgd", "optimizer.lr=24", "ema.momentum=1", *NO_CLIPPING],
        "optimizer.lr=24: try 8.0",
    ),
    "plateau": (
        ["ema.momentum=1", "trainer.max_steps=700", "monitor.health.plateau_steps=300"],
        "ema.momentum=1: try 0.999",
    ),
    "oscillation": (
        ["ema.momentum=0", "optimizer.lr=0.8", "schedule/teacher_momentum=constant"],
        "ema.momentum=0: try 0.5",
    ),
    "gradient_explosion": (
        [
            *("optimizer=sgd", "optimizer.lr=1", "schedule.lr.final=300", *NO_CLIPPING),
            "monitor.health.max_grad_norm_ratio=10",  # how far a run comes before it breaks is chance
        ],
        "trainer.clip_norm=null: try 3.0",
    ),
    "gradient_vanishing": (["loss.student_temp=1e6"], "loss.student_temp=1000000.0: try 0.1"),
    "disagreement": (
        [
            "ema.momentum=1",
            "head.out_dim=1024",
            "optimizer.lr=24",
            "monitor.health.min_agreement=0.1",
            "trainer.max_steps=400",
        ],
        "optimizer.lr=24: try 8.0",
    ),
    "non_finite": (
        ["optimizer.lr=240", "ema.momentum=1", "trainer.max_steps=300", *NO_CLIPPING],
        "optimizer.lr=240: try 80.0",
    ),
}


QUICK = ("uniform_collapse", "constant_collapse", "gradient_explosion", "non_finite")  # `make test` has these


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in PROVOKED]
)
def test_what_provokes_a_verdict_is_named(train: Train, kind: str) -> None:
    overrides, key = PROVOKED[kind]
    events = train(*overrides)
    assert kind in verdicts(events), verdicts(events)
    event = next(event for event in events if event.get("verdict") == kind)
    assert key in event["text"], event["text"]
    assert event["count"] >= 1


def test_a_run_that_learns_has_none(train: Train) -> None:
    """The first steps of the quickstart, judged from its first epoch on."""
    events = train(*QUICKSTART)
    assert verdicts(events) == []
    assert [event["cause"] for event in events if event["event"] == "expected_move"] == ["last_layer_unfrozen"]


PAPER = sorted(path.stem for path in (REPOSITORY / "conf" / "experiment").glob("dino_*.yaml"))
SHORTENED = [  # photographs of 64 and 32 px, 20 steps; everything else as published
    *("trainer.epochs=5", "trainer.limit_steps_per_epoch=4", "trainer.accumulate_steps=1", "dataset.batch_size=8"),
    *("dataset.num_workers=0", "augmentation.global_size=64", "augmentation.local_size=32", "head.out_dim=1024"),
    *("augmentation.num_local_views=2", "schedule.lr.warmup_epochs=1", "trainer.precision=bf16", "~logger.console"),
    *("trainer.limit_evaluation_samples=16", "monitor.every_steps=1", "monitor.health.patience_steps=5"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_recipes_of_the_paper_have_none(tmp_path: Path, shared_data: Callable[[str], Path], name: str) -> None:
    root = shared_data("imagenette_mini")
    # Those with a warm-up of the temperature keep one, in proportion.
    config, _ = checked([f"experiment={name}", f"dataset.root={root}"])
    warm_up = ["loss.warmup_teacher_temp_epochs=2"] if config.loss.warmup_teacher_temp_epochs else []
    events = events_of(tmp_path, f"experiment={name}", f"dataset.root={root}", *SHORTENED, *warm_up)
    assert verdicts(events) == []
    causes = {event["cause"] for event in events}
    assert causes >= {"last_layer_unfrozen", "lr_peak"}


def test_a_collapse_that_is_to_stop_the_run_stops_it(train: Train, tmp_path: Path) -> None:
    with pytest.raises(
        CollapseError, match=r"step \d+: .* constant collapse, for 60 steps. loss.center_momentum=1: try 0.9"
    ):
        train("loss.center_momentum=1", "monitor.on_collapse=stop")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert saved["step"] < 200
    assert saved["health"]["counts"] == {"constant_collapse": 1}


def test_off_is_off(train: Train) -> None:
    assert verdicts(train("loss.center_momentum=1", "monitor.on_collapse=off")) == []


# ---------------------------------------------------------------------- in time, once in a while, counted


def figures(**changed: float) -> dict[str, float]:
    """Of a run that learns."""
    values = {
        "cross_entropy": 3.0,
        "loss_uniform": math.log(64),
        "entropy_teacher": 2.0,
        "entropy_batch_mean": 3.5,
        "mutual_information": 1.5,
        "kl_teacher_student": 1.0,
        "confidence_teacher": 0.5,
        "student_teacher_agreement": 0.6,
        "center_norm": 1.0,
        "grad_norm": 1.0,
        "lr": 1e-3,
    }
    return {f"train/{name}": value for name, value in (values | changed).items()}


CONSTANT = {"entropy_teacher": 0.0, "entropy_batch_mean": 0.0, "mutual_information": 0.0}


def said(health: Health, steps: range, **changed: float) -> list[tuple[int, str, int]]:
    return [
        (step, verdict.kind, verdict.count) for step in steps for verdict in health.observe(step, figures(**changed))
    ]


def test_a_verdict_needs_patience_and_is_repeated_rarely() -> None:
    health = Health(patience_steps=100, repeat_steps=500)
    assert said(health, range(0, 1200, 10), **CONSTANT) == [
        (100, "constant_collapse", 1),
        (600, "constant_collapse", 51),
        (1100, "constant_collapse", 101),
    ]


def test_an_interruption_starts_patience_anew() -> None:
    health = Health(patience_steps=100)
    assert said(health, range(0, 100, 10), **CONSTANT) == []
    assert said(health, range(100, 110, 10)) == []
    assert said(health, range(110, 210, 10), **CONSTANT) == []
    assert said(health, range(210, 220, 10), **CONSTANT) == [(210, "constant_collapse", 1)]


def test_a_collapse_that_changes_its_kind_or_meets_a_nan_is_found_all_the_same() -> None:
    health = Health(patience_steps=100)
    for step in range(0, 100, 10):
        near = {"entropy_teacher": (0.93 if step % 20 else 0.97) * math.log(64), "mutual_information": 0.001}
        assert health.observe(step, figures(**near)) == []
        assert health.observe(step, figures(cross_entropy=math.nan, mutual_information=math.nan)) == []
    assert [kind for _, kind, _ in said(health, range(100, 110, 10), **CONSTANT)] == ["constant_collapse"]


def test_that_a_verdict_no_longer_holds_is_news() -> None:
    health = Health(patience_steps=100)
    said(health, range(0, 150, 10), **CONSTANT)
    assert health.lost is not None
    (over,) = health.observe(150, figures())
    assert (over.kind, over.over, over.text) == ("constant_collapse", True, "constant collapse no longer holds")
    assert health.lost is None
    assert health.observe(160, figures()) == []


def test_an_infinite_norm_is_no_explosion() -> None:
    """fp16 is looking for its scale, or the step was skipped."""
    assert said(Health(), range(0, 200, 10), grad_norm=math.inf) == []


def test_nothing_is_judged_before_warm_ups_are_over() -> None:
    health = Health(patience_steps=100)
    health.facts = Facts(total_steps=10_000, settled_step=1000, settings={})
    assert said(health, range(0, 1100, 10), **CONSTANT) == []
    assert said(health, range(1100, 1110, 10), **CONSTANT) == [(1100, "constant_collapse", 1)]


def test_a_plateau_is_none_while_the_features_improve_or_the_learning_rate_is_low() -> None:
    def found(accuracies: list[float], **changed: float) -> list[tuple[int, str, int]]:
        health = Health(plateau_steps=400)
        health.observe(1, figures())
        for accuracy in accuracies:
            health.observe(1, {"val/knn_top1": accuracy})
        return said(health, range(10, 500, 10), **changed)

    assert found([40.0, 40.0]) == [(410, "plateau", 1)]
    assert found([]) == []
    assert found([40.0, 60.0]) == []
    assert found([40.0, 40.0], lr=1e-5) == []


def test_an_expected_move_is_neither_plateau_nor_oscillation() -> None:
    health = Health(plateau_steps=400, patience_steps=10)
    assert said(health, range(0, 300, 10)) == []
    health.expect_move()
    assert said(health, range(300, 600, 10), cross_entropy=2.0) == []


def test_features_that_become_the_same_are_found_at_an_evaluation() -> None:
    health = Health()
    assert health.observe(0, {"val/feature_std": 0.2, "val/effective_rank_ratio": 0.04}) == []
    assert health.observe(10, {"val/feature_std": 0.2, "val/effective_rank_ratio": 0.03}) == []
    (verdict,) = health.observe(20, {"val/feature_std": 0.01, "val/effective_rank_ratio": 0.03})
    assert (verdict.kind, verdict.severe, verdict.evidence) == ("constant_collapse", True, {"val/feature_std": 0.01})


@pytest.mark.parametrize("cut", [5, 30, 57])
def test_a_resumed_watch_says_what_an_uninterrupted_one_does(cut: int) -> None:
    """Its state is plain; the figures swing, stand still and collapse."""
    options: dict[str, Any] = {"patience_steps": 50, "repeat_steps": 200, "plateau_steps": 200}
    looks = [
        (step, figures(cross_entropy=3 + 2 * (step // 10 % 2), **(CONSTANT if step > 400 else {})))
        for step in range(0, 600, 10)
    ]
    whole = Health(**options)
    expected = [whole.observe(*look) for look in looks]
    before = Health(**options)
    for look in looks[:cut]:
        before.observe(*look)
    after = Health(**options)
    after.load_state_dict(before.state_dict())
    assert [after.observe(*look) for look in looks[cut:]] == expected[cut:]
    assert {verdict.kind for found in expected for verdict in found} >= {"oscillation", "constant_collapse"}


def test_what_cannot_be_a_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"monitor.health.min_entropy=-1: use a number of 0 or more"):
        Health(min_entropy=-1)
    with pytest.raises(ValueError, match=r"monitor.health.patience_steps=0: use a whole number of at least 1"):
        Health(patience_steps=0)
