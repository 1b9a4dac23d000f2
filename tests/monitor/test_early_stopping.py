"""What is best, and when there is no point in going on."""

from typing import Any

import pytest

from dino.monitor import EarlyStopping


def followed(values: list[float], metric: str = "val/knn_top1", **options: Any) -> tuple[EarlyStopping, list[bool]]:
    stopping = EarlyStopping(metric=metric, **options)
    stopping.choose({metric})
    return stopping, [stopping.update(step, {metric: value}) for step, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("available", "chosen"),
    [
        ({"val/knn_top1", "val/loss"}, "val/knn_top1"),
        ({"val/loss"}, "val/loss"),
        (set(), "train/loss_epoch"),
    ],
)
def test_best_follows_k_nn_else_the_validation_loss_else_the_training_loss(available: set[str], chosen: str) -> None:
    stopping = EarlyStopping()
    stopping.choose(available)
    assert stopping.metric == chosen


def test_k_nn_is_better_high_and_a_loss_low() -> None:
    assert followed([50, 60, 60, 55, 61])[1] == [True, True, False, False, True]
    assert followed([2.0, 1.5, 1.7, 1.4], metric="val/loss")[1] == [True, True, False, True]
    assert followed([2.0, 2.5], metric="val/loss", mode="max")[1] == [True, True]


def test_an_improvement_is_more_than_min_delta_and_never_nan() -> None:
    stopping, improved = followed([50, 50.4, 51.1, float("nan")], min_delta=1.0)
    assert improved == [True, False, True, False]
    assert (stopping.best, stopping.best_step, stopping.num_without_improvement) == (51.1, 3, 1)


def test_patience_is_counted_in_evaluations_and_survives_a_resume() -> None:
    stopping, _ = followed([50, 49], patience=2)
    assert not stopping.exhausted
    resumed = EarlyStopping(metric="val/knn_top1", patience=2)
    resumed.load_state_dict(stopping.state_dict())
    assert not resumed.update(3, {"val/knn_top1": 48})
    assert resumed.exhausted
    assert "has not improved on 50 of step 1 in 2 evaluations" in resumed.reason
    assert not followed([50] * 99)[0].exhausted


def test_an_evaluation_without_the_metric_counts_for_nothing() -> None:
    stopping, _ = followed([50], patience=1)
    assert not stopping.update(2, {"train/loss_epoch": 1.0})
    assert not stopping.exhausted


def test_what_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"early_stopping.metric=val/acc: this run has train/loss_epoch, val/loss"):
        EarlyStopping(metric="val/acc", mode="max").choose({"val/loss"})
    with pytest.raises(ValueError, match="whether train/grad_norm is better high or low is not known; use max or min"):
        EarlyStopping(metric="train/grad_norm")
    with pytest.raises(ValueError, match="patience=0: use a whole number of at least 1, or null"):
        EarlyStopping(patience=0)
