"""The real training step against runs of the original implementation (tests/reference)."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dino.augmentation import ViewBatch
from dino.backbone import VisionTransformer
from dino.loss import DINOLoss, EMACentering
from dino.model import DINOHead, MultiCropModel, StudentTeacher
from dino.optimizer import EMA, parameter_groups
from dino.runtime import Precision
from dino.schedule import Constant, Cosine
from dino.training.step import Schedules, TrainStep

CPU = torch.device("cpu")


def make_step(
    backbone: VisionTransformer,
    head: DINOHead,
    *,
    out_dim: int,
    epochs: int,
    steps_per_epoch: int,
    lr: float,
    final_lr: float,
    momentum: float,
    clip: float | None,
    warmup_temp_epochs: int = 2,
) -> TrainStep:
    """A `TrainStep` with 1 warm-up epoch, weight decay 0.04 -> 0.4 and teacher temperature 0.04 -> 0.07."""
    span = {"epochs": epochs, "steps_per_epoch": steps_per_epoch}
    model = StudentTeacher(MultiCropModel(backbone, head))
    return TrainStep(
        model=model,
        loss=DINOLoss(student_temp=0.1, centering=EMACentering(out_dim=out_dim, momentum=0.9)),
        optimizer=torch.optim.AdamW(parameter_groups(model.student), lr=1.0, fused=True),
        ema=EMA(),
        schedules=Schedules(
            lr=Cosine(base=lr, final=final_lr, warmup_epochs=1, **span),
            weight_decay=Cosine(base=0.04, final=0.4, **span),
            teacher_momentum=Cosine(base=momentum, final=1.0, **span),
            teacher_temp=Constant(base=0.07, warmup_start=0.04, warmup_epochs=warmup_temp_epochs, per="epoch", **span),
        ),
        precision=Precision("fp32", CPU),
        clip_mode="per_tensor",
        clip_norm=clip,
        freeze_last_layer_steps=steps_per_epoch,
        total_steps=epochs * steps_per_epoch,
    )


def views(global_views: Tensor, local_views: Tensor) -> list[ViewBatch]:
    batch = global_views.shape[1]
    return [
        ViewBatch(
            global_views=global_views,
            local_views=local_views,
            indices=torch.arange(batch),
            labels=None,
            parameters=None,
            bad=(),
        )
    ]


def test_twelve_steps_equal_the_original(reference: Any) -> None:
    """Losses and every parameter of student, teacher and center after steps 0, 3 and 11, in float64."""
    data = reference("trajectory.npz")
    settings = reference("meta.json")["trajectory"]
    torch.manual_seed(0)
    backbone = VisionTransformer(image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.0)
    head = DINOHead(in_dim=16, out_dim=20, hidden_dim=24, bottleneck_dim=8)
    step = make_step(
        backbone.double(),
        head.double(),
        out_dim=20,
        epochs=settings["epochs"],
        steps_per_epoch=settings["niter"],
        lr=settings["lr"],
        final_lr=settings["min_lr"],
        momentum=settings["momentum"],
        clip=settings["clip"],
    )
    step.loss.double()
    initial = {k.removeprefix("init/"): torch.from_numpy(v) for k, v in data.items() if k.startswith("init/")}
    step.model.student.load_state_dict(initial)
    step.model.teacher.load_state_dict(initial)
    for index in range(12):
        output = step(index, views(torch.from_numpy(data[f"global_{index}"]), torch.from_numpy(data[f"local_{index}"])))
        assert output.terms.total.item() == pytest.approx(data["losses"][index], rel=1e-8)
        if index not in (0, 3, 11):
            continue
        np.testing.assert_allclose(step.loss.centering.center, data[f"center_after_{index}"], rtol=1e-8, atol=1e-12)
        for side in ("student", "teacher"):
            module = getattr(step.model, side)
            compared = 0
            for name, value in module.state_dict().items():
                expected = data[f"{side}_after_{index}/{name}"]
                np.testing.assert_allclose(value, expected, rtol=1e-8, atol=1e-12, err_msg=f"{side} {name} {index}")
                compared += 1
            assert compared == len(initial)


def formula(shape: tuple[int, ...], a: float, b: float, s: float = 1.0) -> Tensor:
    """The deterministic inputs of golden.json: D(shape, a, b, s) = s * sin(a * i + b) over the flat index i."""
    index = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (s * torch.sin(a * index + b)).float().reshape(shape)


@pytest.mark.parametrize(("run", "clip"), [("train_noclip", None), ("train_clip0.05", 0.05)])
def test_twenty_steps_equal_the_golden_run(reference: Any, run: str, clip: float | None) -> None:
    rows = reference("golden.json")[run]
    backbone = VisionTransformer(image_size=224, patch_size=16, embed_dim=32, depth=2, num_heads=2, drop_path_rate=0.0)
    head = DINOHead(in_dim=32, out_dim=64, hidden_dim=48, bottleneck_dim=16)
    with torch.no_grad():
        named = [*backbone.named_parameters(), *head.named_parameters()]
        for j, (name, parameter) in enumerate(named):
            if not name.endswith("weight_g"):
                one = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(formula(tuple(parameter.shape), 0.37, 0.11 * j, 0.05) + one)
    step = make_step(
        backbone, head, out_dim=64, epochs=4, steps_per_epoch=5, lr=0.001, final_lr=1e-6, momentum=0.9, clip=clip
    )
    for it, row in enumerate(rows):
        global_views = torch.stack(
            [formula((4, 3, 224, 224), 0.017 + 0.001 * it, 0.3), formula((4, 3, 224, 224), 0.019 + 0.001 * it, 0.7)]
        )
        local_views = torch.stack([formula((4, 3, 96, 96), 0.023 + 0.002 * k + 0.001 * it, 0.1 * k) for k in range(2)])
        output = step(it, views(global_views, local_views))
        student, teacher = step.model.student, step.model.teacher
        tolerance = 1e-5 if it == 0 else 1e-4
        assert output.terms.total.item() == pytest.approx(row["loss"], rel=tolerance), f"step {it}"
        assert absolute_sum(teacher) == pytest.approx(row["teacher_abs_sum"], rel=1e-4), f"step {it}"
        assert absolute_sum(student) == pytest.approx(row["student_abs_sum"], rel=1e-4), f"step {it}"
        center = step.loss.centering.center.abs().sum().item()
        assert center == pytest.approx(row["center_abs_sum"], rel=1e-4), f"step {it}"


def absolute_sum(module: torch.nn.Module) -> float:
    return sum(parameter.abs().sum().item() for parameter in module.parameters())
