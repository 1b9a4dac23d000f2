"""What one optimizer step promises: accumulation equals the large batch, a bad loss changes nothing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dino.augmentation import ViewBatch
from dino.backbone import VisionTransformer
from dino.loss import DINOLoss, EMACentering
from dino.model import DINOHead, MultiCropModel, StudentTeacher
from dino.optimizer import EMA, ClipMode, parameter_groups
from dino.run import NonFiniteError
from dino.runtime import Precision
from dino.schedule import Constant, Cosine
from dino.training.step import Schedules, TrainStep


def make_step(clip_mode: ClipMode = "per_tensor") -> TrainStep:
    torch.manual_seed(0)
    span = {"epochs": 2, "steps_per_epoch": 2}
    backbone = VisionTransformer(
        image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, channels=1, drop_path_rate=0.0
    )
    model = StudentTeacher(MultiCropModel(backbone, DINOHead(in_dim=16, out_dim=24, hidden_dim=24, bottleneck_dim=8)))
    model.double()
    return TrainStep(
        model=model,
        loss=DINOLoss(student_temp=0.1, centering=EMACentering(out_dim=24, momentum=0.9)).double(),
        optimizer=torch.optim.AdamW(parameter_groups(model.student), lr=1.0),
        ema=EMA(),
        schedules=Schedules(
            lr=Cosine(base=0.01, final=1e-4, **span),
            weight_decay=Constant(base=0.1, **span),
            teacher_momentum=Cosine(base=0.9, final=1.0, **span),
            teacher_temp=Constant(base=0.05, **span),
        ),
        precision=Precision("fp32", torch.device("cpu")),
        clip_mode=clip_mode,
        clip_norm=0.3,
        freeze_last_layer_steps=1,
        total_steps=4,
    )


def random_views(batch: int, seed: int) -> ViewBatch:
    generator = torch.Generator().manual_seed(seed)

    def make(count: int, size: int) -> Tensor:
        return torch.randn(count, batch, 1, size, size, generator=generator, dtype=torch.float64)

    return ViewBatch(
        global_views=make(2, 16),
        local_views=make(3, 8),
        indices=torch.arange(batch),
        labels=None,
        parameters=None,
        bad=(),
    )


def split(views: ViewBatch, parts: int) -> list[ViewBatch]:
    assert views.local_views is not None
    chunks = zip(
        views.global_views.chunk(parts, dim=1),
        views.local_views.chunk(parts, dim=1),
        views.indices.chunk(parts),
        strict=True,
    )
    return [
        ViewBatch(global_views=g, local_views=v, indices=i, labels=None, parameters=None, bad=()) for g, v, i in chunks
    ]


@pytest.mark.parametrize("clip_mode", ["per_tensor", "global_norm"])
def test_accumulation_of_4_x_16_equals_1_x_64(clip_mode: ClipMode) -> None:
    """Student, teacher, center and optimizer moments after 4 steps, in float64."""
    large, small = make_step(clip_mode), make_step(clip_mode)
    for step in range(4):
        views = random_views(64, seed=step)
        large(step, [views])
        small(step, split(views, 4))
    for name, expected in large.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], expected, rtol=1e-9, atol=1e-11, msg=name)
    torch.testing.assert_close(small.loss.centering.center, large.loss.centering.center, rtol=1e-10, atol=1e-13)
    assert small.loss.centering.center.abs().max() > 0


def test_a_non_finite_loss_changes_nothing() -> None:
    step = make_step()
    step(0, [random_views(4, seed=0)])
    before = copy.deepcopy(changed_by_steps(step))
    good, bad = random_views(4, seed=1), random_views(4, seed=2)
    bad.global_views[0, 0, 0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="loss of step 2 is nan"):
        step(1, [good, bad])
    torch.testing.assert_close(changed_by_steps(step), before, rtol=0, atol=0)
    step(1, [good])
    reference = make_step()
    reference(0, [random_views(4, seed=0)])
    reference(1, [good])
    torch.testing.assert_close(step.loss.centering.center, reference.loss.centering.center, rtol=0, atol=0)


def changed_by_steps(step: TrainStep) -> list[Any]:
    return [step.model.state_dict(), step.loss.state_dict(), step.optimizer.state_dict()["state"]]


def test_the_teacher_gets_no_gradients_and_the_student_does() -> None:
    step = make_step()
    step(1, [random_views(4, seed=0)])
    assert all(parameter.grad is None for parameter in step.model.teacher.parameters())
    missing = [n for n, p in step.model.student.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_the_last_layer_is_frozen_for_the_first_steps_only() -> None:
    step = make_step()
    prototypes = step.model.student.head.last_layer.weight_v
    start = prototypes.detach().clone()
    step(0, [random_views(4, seed=0)])
    assert torch.equal(prototypes, start)
    step(1, [random_views(4, seed=1)])
    assert not torch.equal(prototypes, start)
