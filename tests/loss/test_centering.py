"""Centering: when the center moves and by how much; Sinkhorn-Knopp; both over several ranks."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing

from dino.loss import AdaptiveWeighting, DINOLoss, EMACentering, SinkhornKnopp


def rows(count: int, out_dim: int = 8, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, out_dim, generator=generator, dtype=torch.float64)


def summed(logits: Tensor) -> tuple[Tensor, int]:
    """What a loss tells the centering of a micro-batch."""
    return logits.sum(dim=0, keepdim=True), len(logits)


# ---------------------------------------------------------------------- moving average


def test_micro_batches_of_any_size_equal_one_large_batch() -> None:
    large, small = EMACentering(8).double(), EMACentering(8).double()
    for step in range(3):
        logits = rows(32, seed=step)
        large.observe(*summed(logits))
        for part in logits.split([4, 16, 2, 10]):
            small.observe(*summed(part))
        large.update()
        small.update()
    torch.testing.assert_close(small.center, large.center, rtol=1e-13, atol=1e-16)
    assert large.center.abs().max() > 0


def test_targets_are_centered_and_sharpened() -> None:
    centering = EMACentering(8).double()
    centering.center.copy_(rows(1, seed=5))
    logits = rows(6)
    expected = torch.softmax((logits - centering.center) / 0.04, dim=-1)
    torch.testing.assert_close(centering.targets(logits, 0.04), expected)
    torch.testing.assert_close(expected.sum(dim=-1), torch.ones(6, dtype=torch.float64))


def test_observing_alone_moves_nothing_and_updating_alone_neither() -> None:
    centering = EMACentering(8)
    centering.observe(*summed(rows(4)))
    assert centering.center.abs().max() == 0
    centering.update(skipped=torch.tensor(True))
    assert centering.center.abs().max() == 0
    centering.update()
    assert centering.center.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_low_precision_logits_is_taken_in_float32(dtype: torch.dtype) -> None:
    logits = rows(5002, out_dim=4).to(dtype)
    loss = DINOLoss(EMACentering(4, momentum=0.0))
    with torch.autocast("cpu", torch.bfloat16):
        loss.observe(loss(logits, logits, 2, 0.05))
    loss.update(progress=0.0)
    torch.testing.assert_close(loss.centering.center[0], logits.float().mean(dim=0), rtol=1e-5, atol=1e-7)


def test_first_batch_sets_the_center_to_the_mean() -> None:
    centering = EMACentering(8, momentum=0.9, init="first_batch").double()
    first, second = rows(6, seed=1), rows(6, seed=2)
    for part in first.split(2):
        centering.observe(*summed(part))
    centering.update()
    torch.testing.assert_close(centering.center[0], first.mean(dim=0))
    centering.observe(*summed(second))
    centering.update()
    torch.testing.assert_close(centering.center[0], 0.9 * first.mean(dim=0) + 0.1 * second.mean(dim=0))
    centering.reset()
    assert centering.center.abs().max() == 0
    centering.observe(*summed(second))
    centering.update()
    torch.testing.assert_close(centering.center[0], second.mean(dim=0))


@pytest.mark.parametrize("init", ["zeros", "first_batch"])
def test_the_state_goes_on_where_it_was(init: str) -> None:
    one, other = EMACentering(8, init=init), EMACentering(8, init=init)  # type: ignore[arg-type]
    one.observe(*summed(rows(4, seed=1)))
    one.update()
    other.load_state_dict(one.state_dict())
    for centering in (one, other):
        centering.observe(*summed(rows(4, seed=2)))
        centering.update()
    assert torch.equal(one.center, other.center)
    if init == "zeros":
        assert list(one.state_dict()) == ["center"]  # as the original saves it


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"momentum": 1.1}, r"loss\.center_momentum=1\.1: use a number from 0 to 1"),
        ({"momentum": float("nan")}, r"loss\.center_momentum=nan"),
        ({"init": "ones"}, r"loss\.centering\.init=ones: use zeros or first_batch"),
        ({"out_dim": 0}, r"head\.out_dim=0"),
    ],
)
def test_wrong_values_are_refused_by_name(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMACentering(**{"out_dim": 8, **wrong})  # type: ignore[arg-type]


# ---------------------------------------------------------------------- Sinkhorn-Knopp


def test_rows_sum_to_one_and_columns_are_balanced() -> None:
    targets = SinkhornKnopp(num_iterations=50).targets(rows(64), temp=0.5)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(targets.sum(dim=0), torch.full((8,), 64 / 8, dtype=torch.float64), rtol=1e-4, atol=0)


def test_three_rounds_balance_better_than_softmax() -> None:
    logits = rows(64) + 2 * rows(1, seed=9)  # a prototype that nearly everybody likes
    softmax, sinkhorn = torch.softmax(logits / 0.3, dim=1), SinkhornKnopp(3).targets(logits, 0.3)
    torch.testing.assert_close(sinkhorn.sum(dim=1), torch.ones(64, dtype=torch.float64))
    assert sinkhorn.sum(dim=0).std() < 0.2 * softmax.sum(dim=0).std()


def test_equal_to_scaling_the_exponentials_in_turn() -> None:
    logits = rows(10, scale=0.1)
    q = (logits / 0.05).exp()
    for _ in range(3):
        q = q / q.sum(dim=0, keepdim=True)
        q = q / q.sum(dim=1, keepdim=True)
    torch.testing.assert_close(SinkhornKnopp(3).targets(logits, 0.05), q, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_nothing_overflows_at_a_low_temperature(scale: float) -> None:
    logits = (scale * rows(6, out_dim=32)).float()
    targets = SinkhornKnopp().targets(logits, temp=0.02)
    assert torch.isfinite(targets).all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))


def test_it_has_no_state_and_refuses_no_rounds() -> None:
    sinkhorn = SinkhornKnopp()
    before = sinkhorn.targets(rows(4), 0.1)
    sinkhorn.observe(*summed(rows(4, seed=3)))
    sinkhorn.update()
    assert torch.equal(sinkhorn.targets(rows(4), 0.1), before)
    assert sinkhorn.state_dict() == {}
    with pytest.raises(ValueError, match=r"loss\.centering\.num_iterations=0"):
        SinkhornKnopp(num_iterations=0)


# ---------------------------------------------------------------------- ranks


def observe_all(logits: Tensor, terms: Tensor) -> dict[str, Tensor]:
    """What one process makes of its rows and its (global, local) terms."""
    centering, weighting = EMACentering(8).double(), AdaptiveWeighting().double()
    centering.observe(*summed(logits))
    centering.update()
    for global_term, local_term in terms:
        weighting.observe(global_term, local_term)
    weighting.update(progress=0.5)
    targets = SinkhornKnopp().targets(logits, 0.1)
    return {"center": centering.center, "magnitudes": weighting.magnitudes, "targets": targets}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    torch.save(
        observe_all(rows(12).chunk(2)[rank], rows(2, out_dim=2, seed=4).abs()[rank : rank + 1]), f"{folder}/{rank}"
    )
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    # Forked, to save importing torch twice; safe, as the ranks run on one thread each.
    multiprocessing.start_processes(run_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    expected = observe_all(rows(12), rows(2, out_dim=2, seed=4).abs())
    results = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for result in results:
        torch.testing.assert_close(result["center"], expected["center"], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(result["magnitudes"], expected["magnitudes"], rtol=1e-12, atol=1e-15)
    targets = torch.cat([result["targets"] for result in results])
    torch.testing.assert_close(targets, expected["targets"], rtol=1e-10, atol=1e-15)
    assert math.isclose(targets.sum(), 12)
