"""Plain, fused and sliced: one loss, one gradient, one center; from logits and from what logits are made of."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dino.loss import DINOLoss, EMACentering, SinkhornKnopp
from dino.loss.dino_loss import Implementation
from dino.model import DINOHead, Projection
from dino.model.projection import SLICE

FAST: list[Implementation] = ["fused", "sliced"]


@dataclass(frozen=True)
class Result:
    total: Tensor
    global_term: Tensor
    center: Tensor
    gradients: dict[str, Tensor]


def run(
    implementation: Implementation,
    *,
    num_views: int = 5,
    num_global: int = 2,
    batch: int = 3,
    out_dim: int = 2 * SLICE + 100,
    learn_gain: bool = False,
    dtype: torch.dtype = torch.float64,
    autocast: torch.dtype | None = None,
    loss_scale: float = 2.5,  # as a scaler or a share of an accumulated step would have it
    **settings: Any,
) -> Result:
    """Head and loss, forward, backward and center, from features that have a gradient too."""
    torch.manual_seed(0)
    heads = [
        DINOHead(in_dim=6, out_dim=out_dim, hidden_dim=8, bottleneck_dim=7, norm_last_layer=not learn_gain).to(dtype)
        for _ in range(2)
    ]
    for head in heads:
        torch.nn.init.normal_(head.mlp[4].bias)
        torch.nn.init.uniform_(head.last_layer.weight_g, 0.5, 2.0)
    student, teacher = heads[0], heads[1].requires_grad_(False)
    loss = DINOLoss(EMACentering(out_dim), implementation=implementation, **settings).to(dtype)
    loss.centering.center.normal_(std=0.1)
    features = torch.randn(num_views * batch, 6).to(dtype).requires_grad_()
    of_teacher = torch.randn(num_global * batch, 6).to(dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        outputs = student(features), teacher(of_teacher)
    terms = loss(*outputs, num_global, 0.05, features)
    (loss_scale * terms.total).backward()
    loss.observe(terms)
    loss.update(progress=0.5)
    gradients = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert features.grad is not None
    gradients["features"] = features.grad
    return Result(terms.total.detach(), terms.global_term.detach(), loss.centering.center.clone(), gradients)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"learn_gain": True, "batch": 1},
        {"num_views": 2},
        {"num_global": 3, "num_views": 3, "out_dim": 50},
        {"num_global": 3, "num_views": 7, "weighting": "adaptive", "koleo_weight": 0.3},
        {"batch": 70, "out_dim": SLICE, "weighting": "balanced", "local_weight": 0.2},
        {"num_global": 3, "batch": 2, "out_dim": 2**16},  # so many that images are handled one by one
        {"student_temp": 0.004, "out_dim": 300},  # logits of hundreds: exp overflows without the running maximum
    ],
)
def test_fast_is_plain_in_float64(implementation: Implementation, settings: dict[str, Any]) -> None:
    found, expected = run(implementation, **settings), run("plain", **settings)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.global_term, expected.global_term, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.center, expected.center, rtol=1e-12, atol=1e-15)
    assert found.gradients.keys() == expected.gradients.keys()
    assert "last_layer.weight_g" in found.gradients or not settings.get("learn_gain")
    for name, gradient in found.gradients.items():
        scale = expected.gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected.gradients[name], rtol=1e-10, atol=1e-12 * scale, msg=name)


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**10])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", FAST)
def test_half_precision_is_no_further_from_float64_than_plain_autocast(
    implementation: Implementation, autocast: torch.dtype, loss_scale: float
) -> None:
    exact = run("plain", batch=8, out_dim=3 * SLICE, loss_scale=loss_scale)

    def distance(result: Result, name: str) -> float:
        expected = exact.gradients[name]
        return float((result.gradients[name].double() - expected).norm() / expected.norm())

    settings: dict[str, Any] = {"batch": 8, "out_dim": 3 * SLICE, "dtype": torch.float32, "autocast": autocast}
    found, plain = (run(one, loss_scale=loss_scale, **settings) for one in (implementation, "plain"))
    for name in exact.gradients:
        assert distance(found, name) < 1.1 * distance(plain, name) + 1e-6, name
    assert abs(found.total - exact.total) <= 2 * abs(plain.total - exact.total) + 1e-5 * exact.total


@pytest.mark.parametrize("implementation", FAST)
def test_fp16_loses_no_prototype_that_plain_trains(implementation: Implementation) -> None:
    """Among many, most gradients are smaller than fp16 knows numbers, before the scaler's factor is in them."""
    settings: dict[str, Any] = {"batch": 2, "out_dim": 2**17, "loss_scale": 2.0**10}

    def share_without(implementation: Implementation) -> float:
        result = run(implementation, dtype=torch.float32, autocast=torch.float16, **settings)
        return float((result.gradients["last_layer.weight_v"] == 0).all(dim=1).float().mean())

    assert share_without(implementation) < share_without("plain") + 0.1


@pytest.mark.parametrize("loss_scale", [1.0, 2.5])  # the first is the gradient that fused makes ahead
def test_from_logits_every_implementation_is_one(loss_scale: float) -> None:
    """Also under Sinkhorn-Knopp, whose targets cannot be made slice by slice."""
    torch.manual_seed(0)
    student, teacher = torch.randn(12, 40, dtype=torch.float64), torch.randn(6, 40, dtype=torch.float64)
    for centering in (EMACentering(40), SinkhornKnopp()):
        results = []
        for implementation in ("plain", "fused", "auto"):
            logits = student.clone().requires_grad_()
            terms = DINOLoss(centering, implementation=implementation).double()(logits, teacher, 2, 0.07)
            (loss_scale * terms.total).backward()
            assert torch.equal(logits, student), "the caller's logits stay as they are"
            assert logits.grad is not None
            results.append((terms.total.detach(), logits.grad))
        for total, gradient in results[1:]:
            torch.testing.assert_close(total, results[0][0], rtol=1e-12, atol=0)
            torch.testing.assert_close(gradient, results[0][1], rtol=1e-10, atol=1e-15)


def test_sinkhorn_knopp_cannot_be_sliced() -> None:
    with pytest.raises(ValueError, match=r"loss.implementation=sliced: SinkhornKnopp needs all logits at once"):
        DINOLoss(SinkhornKnopp(), implementation="sliced")


def test_logits_of_a_projection_equal_the_product_with_its_prototypes() -> None:
    torch.manual_seed(0)
    rows, directions = (torch.randn(size, 5, dtype=torch.float64, requires_grad=True) for size in (4, SLICE + 3))
    gains = torch.rand(SLICE + 3, 1, dtype=torch.float64, requires_grad=True)
    projection = Projection(rows, directions, gains)
    torch.testing.assert_close(projection.logits(), rows @ projection.prototypes().T, rtol=1e-12, atol=1e-15)


def test_saving_memory_slices_where_the_centering_allows_it() -> None:
    kept = {"plain": "plain", "fused": "fused", "sliced": "sliced", "auto": "sliced"}
    for implementation, expected in kept.items():
        loss = DINOLoss(EMACentering(8), implementation=implementation)  # type: ignore[arg-type]
        loss.save_memory()
        assert loss.implementation == expected
    sinkhorn = DINOLoss(SinkhornKnopp())
    sinkhorn.save_memory()
    assert sinkhorn.implementation == "auto"
    with pytest.raises(ValueError, match=r"loss\.implementation=sliced takes what logits are made of"):
        DINOLoss(EMACentering(8), implementation="sliced")(torch.zeros(4, 8), torch.zeros(4, 8), 2, 0.1)
