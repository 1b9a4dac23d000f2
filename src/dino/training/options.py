"""The settings of `conf/trainer`, checked."""

from dataclasses import dataclass
from typing import Final, Literal

from dino.backbone import Recompute

# `memory` -> what the backbone makes again in the backward pass rather than keep.
RECOMPUTED: Final[dict[str, Recompute]] = {"fast": "nothing", "balanced": "part", "low": "all"}


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """How long and how a run trains; every field is a key of `conf/trainer/default.yaml`, explained there.

    Raises:
        ValueError: for a number out of its range, naming the key.
    """

    epochs: int
    max_steps: int | None = None
    limit_steps_per_epoch: int | None = None
    limit_evaluation_samples: int | None = None
    accumulate_steps: int = 1
    lr_reference_batch: int | None = 256
    clip_mode: Literal["per_tensor", "global_norm"] = "per_tensor"
    clip_norm: float | None = 3.0
    freeze_last_layer_epochs: int = 1
    freeze_backbone_steps: int = 0
    device: str = "auto"
    precision: str = "auto"
    memory: Literal["fast", "balanced", "low"] = "fast"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    num_threads: int | None = None
    save_every_steps: int | None = None
    save_every_epochs: int | None = 1
    keep_checkpoints: int = 2
    keep_every_epochs: int | None = None
    on_save_error: Literal["warn", "stop"] = "warn"
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        at_least_one = ("epochs", "accumulate_steps", "keep_checkpoints")
        at_least_one_or_null = (
            "max_steps",
            "limit_steps_per_epoch",
            "limit_evaluation_samples",
            "lr_reference_batch",
            "num_threads",
            "save_every_steps",
            "save_every_epochs",
            "keep_every_epochs",
        )
        for name in at_least_one + at_least_one_or_null:
            value = getattr(self, name)
            if value is None and name in at_least_one_or_null:
                continue
            if value is None or value < 1:
                null = " or null" if name in at_least_one_or_null else ""
                raise ValueError(f"trainer.{name}={value}: use a whole number of at least 1{null}")
        if self.clip_mode not in ("per_tensor", "global_norm"):
            raise ValueError(f"trainer.clip_mode={self.clip_mode}: use per_tensor or global_norm")
        if self.memory not in RECOMPUTED:
            raise ValueError(f"trainer.memory={self.memory}: use {', '.join(RECOMPUTED)}")
        if self.on_save_error not in ("warn", "stop"):
            raise ValueError(f"trainer.on_save_error={self.on_save_error}: use warn or stop")
        if self.max_skipped_steps < 0:
            raise ValueError(f"trainer.max_skipped_steps={self.max_skipped_steps}: use 0 or more steps")
        if self.freeze_last_layer_epochs < 0:
            raise ValueError(f"trainer.freeze_last_layer_epochs={self.freeze_last_layer_epochs}: use 0 or more epochs")
        if self.freeze_backbone_steps < 0:
            raise ValueError(f"trainer.freeze_backbone_steps={self.freeze_backbone_steps}: use 0 or more steps")
