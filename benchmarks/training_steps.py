"""Contenders that make whole training steps on random views: the baseline, lightly with timm, ours.

Shapes: B images, G global and L local views, C channels, H x W pixels, K prototypes.
"""

import atexit
import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from benchmarks import baseline
from benchmarks.harness import Unavailable
from dino.augmentation import ViewBatch
from dino.config import build, compose
from dino.runtime import Precision, set_seeds, what_lives_stays
from dino.training.assemble import build_step, prepare_process

# What every step trains with; a schedule would change nothing of the time.
LR, WEIGHT_DECAY, TEACHER_MOMENTUM, TEACHER_TEMP = 5e-4, 0.04, 0.996, 0.04
STEPS_PER_EPOCH = 1000


def compose_step(
    *,
    backbone: str = "vit_s16",
    out_dim: int = 65536,
    batch: int = 16,
    num_local_views: int = 6,
    global_size: int = 224,
    local_size: int = 96,
    drop_path: float = 0.1,
    depth: int = 12,
    overrides: Sequence[str] = (),
) -> DictConfig:
    """The config of a step that all contenders read; the prototypes learn, as they do after the first epoch."""
    return compose(
        [
            *("dataset=imagenet", f"backbone={backbone}", f"backbone.depth={depth}"),
            f"backbone.drop_path_rate={drop_path}",
            *(f"head.out_dim={out_dim}", f"dataset.batch_size={batch}"),
            *(f"augmentation.num_local_views={num_local_views}", f"augmentation.global_size={global_size}"),
            *(f"augmentation.local_size={local_size}", "trainer.freeze_last_layer_epochs=0", *overrides),
        ]
    )


def random_views(config: DictConfig, device: torch.device) -> ViewBatch:
    """Normal values [G, B, C, H, W] and [L, B, C, h, w], the same for all contenders."""
    generator = torch.Generator().manual_seed(1)
    made, batch = config.augmentation, config.dataset.batch_size

    def normal(num_views: int, size: int) -> Tensor:
        return torch.randn(num_views, batch, made.channels, size, size, generator=generator).to(device)

    return ViewBatch(
        global_views=normal(2, made.global_size),
        local_views=normal(made.num_local_views, made.local_size) if made.num_local_views else None,
        indices=torch.arange(batch),
        labels=None,
        parameters=None,
        bad=(),
    )


def list_of_views(views: ViewBatch) -> list[Tensor]:
    """V views [B, C, H, W]."""
    local_views = () if views.local_views is None else views.local_views.unbind()
    return [*views.global_views.unbind(), *local_views]


class StepWork(ABC):
    """Step after step on the same views; the answer is the loss of the first."""

    def __init__(self, views: ViewBatch) -> None:
        self.views = views
        self.step = 0
        self.first_loss: Tensor | float | None = None

    def __call__(self) -> None:
        loss = self.train()
        if self.first_loss is None:
            self.first_loss = loss
        self.step += 1

    @abstractmethod
    def train(self) -> Tensor | float: ...

    def answer(self) -> float:
        assert self.first_loss is not None
        return float(self.first_loss)


class OurStep(StepWork):
    """What `python train.py` would do, allocator included."""

    def __init__(self, config: DictConfig, device: torch.device, steps_per_epoch: int = STEPS_PER_EPOCH) -> None:
        super().__init__(random_views(config, device))
        options = build(config, "trainer")
        precision = prepare_process(replace(options, device=device.type, num_threads=None))  # threads: the harness's
        set_seeds(config.seed)
        self.train_step = build_step(config, options, precision, steps_per_epoch, config.dataset.batch_size)
        process = contextlib.ExitStack()
        process.enter_context(what_lives_stays())
        atexit.register(process.close)

    def train(self) -> Tensor:
        return self.train_step(self.step, [self.views]).loss


class BaselineStep(StepWork):
    """The textbook's, from the same weights."""

    def __init__(self, config: DictConfig, precision: str, device: torch.device) -> None:
        super().__init__(random_views(config, device))
        self.list_of_views = list_of_views(self.views)
        self.training = baseline_training(config, precision, device)

    def train(self) -> float:
        return self.training(
            self.list_of_views,
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            teacher_momentum=TEACHER_MOMENTUM,
            teacher_temp=TEACHER_TEMP,
        )


class LightlyStep(StepWork):
    """lightly's loss, head and moving average around timm's ViT, one forward pass per resolution."""

    def __init__(self, config: DictConfig, precision: str, fused_attention: bool, device: torch.device) -> None:
        super().__init__(random_views(config, device))
        from timm import create_model
        from timm.layers import set_fused_attn

        set_fused_attn(fused_attention)  # read by the networks as they are made
        loss_module, heads, self.update_momentum = _lightly()
        names = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}
        network, head = config.backbone, config.head

        def model(drop_path: float) -> nn.Module:
            backbone = create_model(
                names[network.embed_dim],
                num_classes=0,
                img_size=network.image_size,
                depth=network.depth,
                dynamic_img_size=True,
                drop_path_rate=drop_path,
            )
            projection = heads.DINOProjectionHead(
                network.embed_dim, head.hidden_dim, head.bottleneck_dim, head.out_dim, freeze_last_layer=0
            )
            return nn.Sequential(backbone, projection)

        self.student, self.teacher = model(network.drop_path_rate).to(device), model(0.0).to(device)
        load_our_weights(self.student, our_weights(config))
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.loss = loss_module.DINOLoss(head.out_dim).to(device)
        self.optimizer = torch.optim.AdamW(baseline.parameter_groups(self.student), lr=LR, weight_decay=WEIGHT_DECAY)
        self.clip, self.autocast = config.trainer.clip_norm, Precision(precision, device).autocast

    def train(self) -> Tensor:
        backbone, head = self.student[0], self.student[1]
        global_views = self.views.global_views.flatten(0, 1)
        with self.autocast():
            with torch.no_grad():
                teacher_logits = self.teacher(global_views)
            features = [backbone(global_views)]
            if self.views.local_views is not None:
                features.append(backbone(self.views.local_views.flatten(0, 1)))
            student_logits = head(torch.cat(features))
            batch = self.views.global_views.shape[1]
            loss: Tensor = self.loss(
                list(teacher_logits.split(batch)), list(student_logits.split(batch)), teacher_temp=TEACHER_TEMP
            )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.clip)
        self.optimizer.step()
        self.update_momentum(self.student, self.teacher, m=TEACHER_MOMENTUM)
        return loss.detach()


def ours(device: torch.device, overrides: Sequence[str] = (), **settings: Any) -> OurStep:
    return OurStep(compose_step(**settings, overrides=overrides), device)


def plain(device: torch.device, precision: str, **settings: Any) -> BaselineStep:
    return BaselineStep(compose_step(**settings), precision, device)


def lightly(device: torch.device, precision: str, fused_attention: bool = True, **settings: Any) -> LightlyStep:
    return LightlyStep(compose_step(**settings), precision, fused_attention, device)


def baseline_networks(config: DictConfig, device: torch.device) -> tuple[baseline.MultiCrop, baseline.MultiCrop]:
    """Student and teacher in the shapes of the config, with weights of their own."""
    network, head = config.backbone, config.head

    def model(drop_path: float) -> baseline.MultiCrop:
        backbone = baseline.VisionTransformer(
            network.image_size,
            network.patch_size,
            network.channels,
            network.embed_dim,
            network.depth,
            network.num_heads,
            drop_path,
        )
        return baseline.MultiCrop(
            backbone, baseline.Head(network.embed_dim, head.out_dim, head.hidden_dim, head.bottleneck_dim)
        ).to(device)

    return model(network.drop_path_rate), model(0.0)


def baseline_training(config: DictConfig, precision: str, device: torch.device) -> baseline.Training:
    """The baseline with the weights that ours starts from."""
    student, teacher = baseline_networks(config, device)
    student.load_state_dict(our_weights(config))
    loss = baseline.DINOLoss(config.head.out_dim, 2 + config.augmentation.num_local_views, config.loss.student_temp)
    return baseline.Training(
        student,
        teacher,
        loss.to(device),
        precision=precision,
        clip=config.trainer.clip_norm,
        koleo_weight=config.loss.koleo_weight,
    )


def our_weights(config: DictConfig) -> dict[str, Tensor]:
    """Of the student that `OurStep` starts with."""
    set_seeds(config.seed)
    backbone = build(config, "backbone")
    head = build(config, "head", in_dim=backbone.embed_dim)
    return {
        **{f"backbone.{name}": value for name, value in backbone.state_dict().items()},
        **{f"head.{name}": value for name, value in head.state_dict().items()},
    }


def load_our_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Into timm's ViT and lightly's head, side by side: the same parameters, in the head under other names."""
    places = {"backbone.": "0.", "head.mlp.": "1.layers.", "head.last_layer.": "1.last_layer."}
    renamed = {}
    for name, value in weights.items():
        old = next(prefix for prefix in places if name.startswith(prefix))
        renamed[places[old] + name.removeprefix(old)] = copy.deepcopy(value)
    model.load_state_dict(renamed)


def _lightly() -> tuple[Any, Any, Any]:
    try:
        from lightly.loss import dino_loss
        from lightly.models.modules import heads
        from lightly.models.utils import update_momentum
    except ImportError as error:
        raise Unavailable("lightly is not installed: pip install -e .[bench]") from error
    return dino_loss, heads, update_momentum
