"""The loss: equal to the original and to the step-by-step reference, in value, gradient and center."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dino.loss import DINOLoss, EMACentering, SinkhornKnopp, koleo_loss, num_pairs
from dino.loss.reference import step_by_step


def make_loss(out_dim: int, *, double: bool = True, **settings: Any) -> DINOLoss:
    loss = DINOLoss(centering=EMACentering(out_dim), **settings)
    return loss.double() if double else loss


def logits(
    num_views: int, num_global_views: int, batch: int, out_dim: int, *, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Student [V*B, K] with gradient and teacher [G*B, K], float64."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_views * batch, out_dim, generator=generator, dtype=torch.float64) * scale
    teacher = torch.randn(num_global_views * batch, out_dim, generator=generator, dtype=torch.float64) * scale
    return student.requires_grad_(), teacher


# ---------------------------------------------------------------------- parity


@pytest.mark.parametrize("number", [0, 1, 2])
def test_six_steps_equal_the_original(reference: Callable[[str], dict[str, Any]], number: int) -> None:
    """Loss, gradient and center, step after step from a zero center, in float64."""
    data = reference(f"loss_{number}.npz")
    settings = reference("meta.json")[f"loss_{number}"]
    centering = EMACentering(settings["out_dim"], momentum=settings["center_momentum"])
    loss = DINOLoss(centering=centering, student_temp=settings["student_temp"]).double()
    for step in range(settings["steps"]):
        np.testing.assert_allclose(centering.center, data[f"center_before_{step}"], rtol=1e-10, atol=1e-15)
        student = torch.from_numpy(data[f"student_{step}"]).requires_grad_()
        teacher = torch.from_numpy(data[f"teacher_{step}"])
        terms = loss(student, teacher, settings["n_global_crops"], float(data[f"teacher_temp_{step}"]))
        terms.total.backward()
        loss.observe(terms)
        loss.update(progress=0.0)
        np.testing.assert_allclose(terms.total.item(), data[f"loss_{step}"], rtol=1e-10)
        np.testing.assert_allclose(student.grad, data[f"grad_student_{step}"], rtol=1e-10, atol=1e-15)
        np.testing.assert_allclose(centering.center, data[f"center_after_{step}"], rtol=1e-10, atol=1e-15)


def test_golden_calls_in_float32(reference: Callable[[str], dict[str, Any]]) -> None:
    golden = reference("golden.json")["loss"]
    batch, num_views, out_dim = golden["B"], golden["ncrops"], golden["K"]
    loss = make_loss(out_dim, double=False)

    def formula(rows: int, a: float, b: float) -> Tensor:
        return torch.sin(a * torch.arange(rows * out_dim, dtype=torch.float64) + b).float().reshape(rows, out_dim)

    for call in golden["calls"]:
        epoch = call["epoch"]
        teacher = formula(2 * batch, 0.3, 0.2 + 0.1 * epoch)
        terms = loss(formula(num_views * batch, 0.7, 0.1 * epoch), teacher, 2, golden["temps"][epoch])
        loss.observe(terms)
        loss.update(progress=0.0)
        assert terms.total.item() == pytest.approx(call["loss"], rel=1e-5)
        np.testing.assert_allclose(loss.centering.center.flatten(), call["center"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("num_global", "num_local", "batch", "out_dim"),
    [(2, 8, 3, 8), (2, 0, 4, 8), (3, 2, 2, 8), (2, 1, 1, 1000), (4, 0, 2, 1000), (2, 6, 5, 1000)],
)
def test_equal_to_the_step_by_step_reference(num_global: int, num_local: int, batch: int, out_dim: int) -> None:
    student, teacher = logits(num_global + num_local, num_global, batch, out_dim)
    loss = make_loss(out_dim)
    loss.centering.center.normal_(generator=torch.Generator().manual_seed(7))
    center = loss.centering.center.clone()
    terms = loss(student, teacher, num_global, 0.05)
    (gradient,) = torch.autograd.grad(terms.total, student)
    loss.observe(terms)
    loss.update(progress=0.0)

    steps = step_by_step(
        student,
        teacher,
        num_global_views=num_global,
        student_temp=0.1,
        teacher_temp=0.05,
        center=center,
        center_momentum=0.9,
    )
    (expected_gradient,) = torch.autograd.grad(steps.total, student)
    torch.testing.assert_close(terms.total, steps.total, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(terms.global_term, steps.global_term, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.centering.center, steps.center_after, rtol=1e-12, atol=1e-15)
    num_global_pairs, num_local_pairs = num_pairs(num_global, num_local)
    assert len(steps.pair_losses) == num_global_pairs + num_local_pairs
    if num_local == 0:
        assert terms.local_term is None
        assert steps.local_term is None
    else:
        torch.testing.assert_close(terms.local_term, steps.local_term, rtol=1e-12, atol=0)


def test_the_docstrings_loops_count_18_pairs_for_2_and_8_views() -> None:
    assert num_pairs(2, 8) == (2, 16)
    assert num_pairs(2, 0) == (2, 0)


def test_views_are_rows_of_whole_views() -> None:
    """With a student that is right about local view 3 only, the local term alone falls."""
    batch, out_dim = 2, 6
    _, teacher = logits(5, 2, batch, out_dim)
    student = torch.zeros(5 * batch, out_dim, dtype=torch.float64)
    base = make_loss(out_dim)(student, teacher, 2, 0.1)
    student[3 * batch : 4 * batch] = (teacher[:batch] + teacher[batch:]) * 0.1
    better = make_loss(out_dim)(student, teacher, 2, 0.1)
    assert better.global_term == base.global_term
    assert better.local_term < base.local_term


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = logits(4, 2, 3, 8)
    teacher.requires_grad_()
    make_loss(8)(student, teacher, 2, 0.05).total.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_forward_changes_no_state() -> None:
    student, teacher = logits(4, 2, 3, 8)
    loss = make_loss(8, weighting="adaptive")
    terms = loss(student, teacher, 2, 0.05)
    loss.observe(terms)
    loss.update(progress=0.5)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    assert before["centering.center"].abs().max() > 0
    loss(student * 2, teacher * 2, 2, 0.05)
    loss.update(progress=0.9)  # nothing was observed
    assert all(torch.equal(loss.state_dict()[name], value) for name, value in before.items())


def test_a_skipped_update_drops_what_was_observed() -> None:
    student, teacher = logits(4, 2, 3, 8)
    loss, clean = make_loss(8, weighting="adaptive"), make_loss(8, weighting="adaptive")
    terms = loss(student, teacher, 2, 0.05)
    loss.observe(replace(terms, teacher_sum=terms.teacher_sum * 5))
    loss.update(progress=0.1, skipped=torch.tensor(True))
    for one in (loss, clean):
        one.observe(terms)
        one.update(progress=0.1)
    assert all(torch.equal(value, clean.state_dict()[name]) for name, value in loss.state_dict().items())


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("out_dim", [8, 1000])
@pytest.mark.parametrize("centering", ["ema", "sinkhorn"])
def test_huge_logits_stay_finite_in_float32(out_dim: int, centering: str) -> None:
    student, teacher = logits(6, 2, 4, out_dim, scale=1e4)
    student = student.detach().float().requires_grad_()
    loss = DINOLoss(centering=EMACentering(out_dim) if centering == "ema" else SinkhornKnopp(), student_temp=0.1)
    terms = loss(student, teacher.float(), 2, 0.02)
    terms.total.backward()
    assert torch.isfinite(terms.total)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_never_negative() -> None:
    """Also where student and teacher agree and are certain, and where rounding decides."""
    for seed in range(30):
        scale = 10.0 ** (seed % 6 - 2)
        student, teacher = logits(5, 3, 2, 16, seed=seed, scale=scale)
        terms = make_loss(16, double=False)(student.float(), teacher.float(), 3, 0.02)
        assert min(terms.total, terms.global_term, terms.local_term) > 0
    certain = 100 * torch.eye(4).repeat(4, 1)
    terms = make_loss(4, double=False)(certain, certain[:8], 2, 0.02)
    assert 0 <= terms.total < 1e-6


def test_lower_types_are_raised_and_float64_stays() -> None:
    student, teacher = logits(4, 2, 3, 8)
    assert make_loss(8)(student, teacher, 2, 0.05).total.dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        low, low_teacher = student.detach().to(dtype).requires_grad_(), teacher.to(dtype)
        loss = make_loss(8, double=False)
        terms = loss(low, low_teacher, 2, 0.05)
        expected = make_loss(8, double=False)(low.detach().float(), low_teacher.float(), 2, 0.05)
        assert terms.total.dtype == torch.float32
        assert torch.equal(terms.total, expected.total)
        terms.total.backward()
        assert low.grad is not None
        assert low.grad.dtype == dtype


@pytest.mark.parametrize("centering", [EMACentering(1000), SinkhornKnopp()])
def test_autocast_does_not_lower_the_arithmetic(centering: Any) -> None:
    student, teacher = logits(4, 2, 3, 1000)
    features = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    loss = DINOLoss(centering=centering, koleo_weight=0.1)
    arguments = (student.detach().float(), teacher.float(), 2, 0.05, features)
    plain = loss(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(*arguments)
        loss.observe(inside)
    assert torch.equal(inside.total, plain.total)
    assert torch.equal(inside.koleo, plain.koleo)


# ---------------------------------------------------------------------- KoLeo


def test_koleo_equals_its_formula_on_the_global_views_only() -> None:
    student, teacher = logits(5, 2, 6, 8)
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def plain(view: Tensor) -> float:
        unit = view / view.norm(dim=1, keepdim=True)
        nearest = [min((unit[i] - unit[j]).norm().item() for j in range(6) if j != i) for i in range(6)]
        return float(-np.mean(np.log(nearest)))

    expected = (plain(features[:6]) + plain(features[6:12])) / 2
    terms = make_loss(8, koleo_weight=0.3)(student, teacher, 2, 0.05, features)
    without = make_loss(8)(student, teacher, 2, 0.05, features)
    assert without.koleo is None
    assert terms.koleo.item() == pytest.approx(expected, rel=1e-10)
    assert (terms.total - without.total).item() == pytest.approx(0.3 * expected, rel=1e-9)


def test_koleo_of_one_image_is_zero() -> None:
    features = torch.randn(1, 4, requires_grad=True)
    assert koleo_loss(features[None]) == 0
    student, teacher = logits(3, 2, 1, 8)
    terms = make_loss(8, koleo_weight=1.0)(student, teacher, 2, 0.05, features.expand(3, -1))
    terms.total.backward()
    assert torch.isfinite(student.grad).all()


def test_koleo_of_equal_features_is_finite_in_value_and_gradient() -> None:
    features = torch.ones(4, 8, requires_grad=True)
    value = koleo_loss(features[None])
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(features.grad).all()


def test_koleo_pushes_neighbours_apart() -> None:
    angles = torch.tensor([0.0, 0.1, 2.0, 4.0], requires_grad=True)
    koleo_loss(torch.stack([angles.cos(), angles.sin()], dim=1)[None]).backward()
    assert angles.grad[0] > 0 > angles.grad[1]  # going down the gradient takes 0 and 0.1 apart


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"student_temp": 0.0}, r"loss\.student_temp=0\.0: use a number above 0"),
        ({"koleo_weight": -1.0}, r"loss\.koleo_weight=-1\.0: use"),
        ({"weighting": "even"}, r"loss\.weighting=even: use pairs, balanced, adaptive"),
        ({"local_weight": 0.5}, r"loss\.local_weight=0\.5 has no effect with loss\.weighting=pairs"),
        ({"weighting": "balanced", "local_weight": -1.0}, r"loss\.local_weight=-1\.0: use a number of 0 or more"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loss(8, **wrong)


def test_wrong_calls_are_refused() -> None:
    student, teacher = logits(4, 2, 3, 8)
    loss = make_loss(8)
    with pytest.raises(ValueError, match=r"loss\.teacher_temp=0\.0: use a number above 0"):
        loss(student, teacher, 2, 0.0)
    with pytest.raises(ValueError, match="num_global_views=1"):
        loss(student, teacher, 1, 0.05)
    for bad_student, bad_teacher in [(student[:-1], teacher), (student, teacher[:-1]), (student[:3], teacher)]:
        with pytest.raises(ValueError, match=r"use \[V\*B, K\]"):
            loss(bad_student, bad_teacher, 2, 0.05)
    with pytest.raises(ValueError, match=r"use \[V\*B, K\]"):
        loss(student[:, :4], teacher, 2, 0.05)
    with pytest.raises(ValueError, match=r"loss\.koleo_weight=0\.1 needs the student's features"):
        make_loss(8, koleo_weight=0.1)(student, teacher, 2, 0.05)
