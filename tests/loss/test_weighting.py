"""How the global and the local term make the total."""

import math
from typing import Any

import pytest
import torch

from dino.loss import AdaptiveWeighting, BalancedWeighting, DINOLoss, EMACentering, LossTerms, PairsWeighting


def terms_of(loss: DINOLoss, num_local: int = 4, seed: int = 0) -> LossTerms:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn((2 + num_local) * 3, 8, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2 * 3, 8, generator=generator, dtype=torch.float64)
    terms: LossTerms = loss(student, teacher, 2, 0.05)
    return terms


def make_loss(**settings: Any) -> DINOLoss:
    return DINOLoss(centering=EMACentering(8), **settings).double()


def test_pairs_counts_every_pair_the_same() -> None:
    assert PairsWeighting().weights(2, 16) == (2 / 18, 16 / 18)
    terms = terms_of(make_loss())
    expected = (2 * terms.global_term + 8 * terms.local_term) / 10
    torch.testing.assert_close(terms.total, expected)
    assert terms.weights == (0.2, 0.8)


def test_balanced_does_not_depend_on_the_number_of_pairs() -> None:
    assert BalancedWeighting(0.5).weights(2, 16) == BalancedWeighting(0.5).weights(2, 4) == (1.0, 0.5)
    terms = terms_of(make_loss(weighting="balanced", local_weight=0.5))
    torch.testing.assert_close(terms.total, terms.global_term + 0.5 * terms.local_term)


@pytest.mark.parametrize("weighting", ["pairs", "balanced", "adaptive"])
def test_without_local_views_the_total_is_the_global_term(weighting: Any) -> None:
    loss = make_loss(weighting=weighting)
    terms = terms_of(loss, num_local=0)
    loss.observe(terms)
    loss.update(progress=0.5)
    assert terms.total == terms.global_term
    assert terms.local_term is None


def feed(weighting: AdaptiveWeighting, terms: list[tuple[float, float]], total: int) -> None:
    for step, (global_term, local_term) in enumerate(terms):
        weighting.observe(torch.tensor(global_term).double(), torch.tensor(local_term).double())
        weighting.update(progress=(step + 1) / total)


def test_adaptive_starts_as_pairs() -> None:
    assert [float(w) for w in AdaptiveWeighting().weights(2, 16)] == pytest.approx([2 / 18, 16 / 18])


@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_adaptive_ends_with_contributions_in_the_wanted_ratio(ratio: float) -> None:
    weighting = AdaptiveWeighting(local_weight=ratio).double()
    feed(weighting, [(4.0, 8.0)] * 10, total=10)
    global_weight, local_weight = weighting.weights(2, 16)
    assert float(8.0 * local_weight) == pytest.approx(ratio * float(4.0 * global_weight))


def test_adaptive_equals_its_formula_in_the_middle_of_a_run() -> None:
    values = [(5.0, 7.0), (4.0, 6.5), (3.0, 6.0)]
    weighting = AdaptiveWeighting(local_weight=0.5, momentum=0.9).double()
    feed(weighting, values, total=8)
    means = [0.0, 0.0]
    for pair in values:
        means = [0.9 * mean + 0.1 * value for mean, value in zip(means, pair, strict=True)]
    phase = (1 - math.cos(math.pi * 3 / 8)) / 2
    mean_all = (2 * means[0] + 16 * means[1]) / 18
    expected = (
        (1 - phase) * 2 / 18 + phase * mean_all / (1.5 * means[0]),
        (1 - phase) * 16 / 18 + phase * mean_all * 0.5 / (1.5 * means[1]),
    )
    actual = tuple(float(weight) for weight in weighting.weights(2, 16))
    assert actual == pytest.approx(expected, rel=1e-12)
    # The size of the total is that of `pairs`, whatever the phase.
    assert actual[0] * means[0] + actual[1] * means[1] == pytest.approx(mean_all, rel=1e-12)


def test_adaptive_weights_act_on_the_total_and_carry_no_gradient() -> None:
    loss = make_loss(weighting="adaptive")
    feed(loss.weighting, [(4.0, 8.0)] * 3, total=4)  # type: ignore[arg-type]
    terms = terms_of(loss)
    global_weight, local_weight = terms.weights
    assert isinstance(local_weight, torch.Tensor)
    assert not local_weight.requires_grad
    torch.testing.assert_close(terms.total, global_weight * terms.global_term + local_weight * terms.local_term)


def test_adaptive_takes_micro_batches_as_one_step() -> None:
    parts, whole = AdaptiveWeighting().double(), AdaptiveWeighting().double()
    for global_term, local_term in [(4.0, 8.0), (2.0, 6.0)]:
        parts.observe(torch.tensor(global_term).double(), torch.tensor(local_term).double())
    parts.update(progress=0.25)
    feed(whole, [(3.0, 7.0)], total=4)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())


def test_adaptive_goes_on_where_it_was() -> None:
    straight, first, second = (make_loss(weighting="adaptive") for _ in range(3))
    feed(straight.weighting, [(5.0, 7.0), (4.0, 6.0)], total=4)  # type: ignore[arg-type]
    feed(first.weighting, [(5.0, 7.0), (4.0, 6.0)], total=4)  # type: ignore[arg-type]
    assert {"weighting.magnitudes", "weighting.phase", "centering.center"} == first.state_dict().keys()
    second.load_state_dict(first.state_dict())
    assert torch.equal(terms_of(second).total, terms_of(straight).total)
    assert not torch.equal(terms_of(second).total, terms_of(make_loss()).total)


def test_a_wrong_momentum_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"loss\.weighting\.momentum=1"):
        AdaptiveWeighting(momentum=1.0)
