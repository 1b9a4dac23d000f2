"""`trainer.memory`: the same step in less memory, whatever the backbone."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dino.augmentation import ViewBatch
from dino.backbone import Backbone, ConvolutionalBackbone, Recompute, TimmBackbone, VisionTransformer
from dino.loss import DINOLoss, EMACentering
from dino.model import DINOHead, MultiCropModel, StudentTeacher
from dino.optimizer import EMA, parameter_groups
from dino.runtime import Precision
from dino.schedule import Constant
from dino.training.step import Schedules, TrainStep


def our_vit() -> Backbone:
    return VisionTransformer(
        image_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, drop_path_rate=0.3, channels=3
    )


def resnet() -> Backbone:
    """With running statistics of batch norm, which a second pass must not move again."""
    return ConvolutionalBackbone(architecture="resnet18", stem="small")


def timm_vit() -> Backbone:
    return TimmBackbone(model_name="test_vit", image_size=32, patch_size=16, drop_path_rate=0.3)


def make_step(make: Callable[[], Backbone], recompute: Recompute, precision: str = "fp32") -> TrainStep:
    torch.manual_seed(0)
    backbone = make()
    head = DINOHead(in_dim=backbone.embed_dim, out_dim=24, hidden_dim=24, bottleneck_dim=8)
    model = StudentTeacher(MultiCropModel(backbone, head))
    model.student.backbone.recompute = recompute
    span = {"epochs": 1, "steps_per_epoch": 5}
    constant: dict[str, Any] = {
        name: Constant(base=base, **span)
        for name, base in {"lr": 0.01, "weight_decay": 0.1, "teacher_momentum": 0.9, "teacher_temp": 0.05}.items()
    }
    return TrainStep(
        model=model,
        loss=DINOLoss(EMACentering(24)),
        optimizer=torch.optim.AdamW(parameter_groups(model.student), fused=True),
        ema=EMA(),
        schedules=Schedules(**constant),
        precision=Precision(precision, torch.device("cpu")),
        clip_mode="per_tensor",
        clip_norm=0.3,
        freeze_last_layer_steps=0,
        total_steps=5,
    )


def views() -> ViewBatch:
    generator = torch.Generator().manual_seed(1)
    sizes = ((2, 32), (3, 16))
    of_sizes = [torch.randn(count, 4, 3, size, size, generator=generator) for count, size in sizes]
    return ViewBatch(*of_sizes, torch.arange(4), None, None, ())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [our_vit, resnet, timm_vit])
@pytest.mark.parametrize("recompute", ["part", "all"])
def test_what_is_recomputed_changes_no_bit(make: Callable[[], Backbone], recompute: Recompute, precision: str) -> None:
    """Losses, gradients, parameters, buffers and the random numbers that are left, over three steps."""
    found = []
    for which in ("nothing", recompute):
        step = make_step(make, which, precision)
        torch.manual_seed(5)
        losses = [step(n, [views()]).loss for n in range(3)]
        gradients = [parameter.grad for parameter in step.model.student.parameters() if parameter.grad is not None]
        found.append([*losses, *gradients, *step.model.state_dict().values(), torch.rand(1)])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


@contextmanager
def kept() -> Iterator[list[int]]:
    """The bytes of every storage that is kept for the backward pass."""
    sizes: dict[int, int] = {}
    total: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(sizes.values()))


def test_less_is_kept() -> None:
    """Of a ViT, whose blocks a step with little memory makes again whole, and one with some in part."""
    bytes_kept: dict[str, int] = {}
    batch = views()
    assert batch.local_views is not None
    parameters = 0
    which: Recompute
    for which in ("nothing", "part", "all"):
        model = make_step(our_vit, which).model
        parameters = sum(parameter.nbytes for parameter in model.student.parameters())
        with kept() as total:
            output = model.student_forward(batch.global_views, batch.local_views)
        bytes_kept[which] = total[0]
        del output
    assert bytes_kept["part"] < 0.75 * bytes_kept["nothing"]
    assert bytes_kept["all"] - parameters < 0.35 * (bytes_kept["nothing"] - parameters)


KEPT = """
import psutil, torch
from dino.runtime import reuse_freed_memory
process = psutil.Process()
for reuse, size in ((True, 100), (False, 150), (True, 100)):
    reuse_freed_memory(reuse)
    tensor = torch.ones(size << 20)  # the second fits into nothing that the first has left
    before = process.memory_info().rss
    del tensor
    print(before - process.memory_info().rss < 200 << 20)
"""


def test_freed_memory_is_kept_or_given_back_as_last_told() -> None:
    """Points of one multirun share a process."""
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"]
