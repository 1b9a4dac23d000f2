"""What each key of the config may be: the table `RULES`, and what a rule is."""

import fnmatch
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a value may be. `count` asks for a list of so many (0: any number), `ascending` for an ordered one."""

    kind: type[int] | type[float] | type[str] | type[bool]
    low: float | None = None
    above: float | None = None
    high: float | None = None
    null: bool = False
    choices: tuple[str, ...] = ()
    count: int | None = None
    ascending: bool = False

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.null
        if isinstance(value, str) and value in self.choices:
            return True
        if self.count is None:
            return self._accepts_one(value)
        if not isinstance(value, list) or (self.count and len(value) != self.count):
            return False
        return all(map(self._accepts_one, value)) and not (self.ascending and value != sorted(value))

    def _accepts_one(self, value: Any) -> bool:
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        if self.kind is str:
            return isinstance(value, str) and not self.choices
        if not isinstance(value, (int, float) if self.kind is float else int):
            return False
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
        )

    def __str__(self) -> str:
        """What would be right, in words."""
        if self.kind is bool:
            text = "true or false"
        elif self.kind is str:
            text = " or ".join(self.choices) or ("text" if self.count is None else "a list of texts")
        else:
            text = self._numbers()
            text += f" or {' or '.join(self.choices)}" if self.choices else ""
        return f"{text} or null" if self.null else text

    def _numbers(self) -> str:
        noun = "whole number" if self.kind is int else "number"
        if self.count is None:
            text = f"a {noun}"
        else:
            many = {0: "a list of", 2: "a list of two", 3: "a list of three"}[self.count]
            text = f"{many}{' ascending' if self.ascending else ''} {noun}s"
        low = f"above {self.above:g}" if self.above is not None else None
        if self.low is not None and self.high is not None:
            return f"{text} from {self.low:g} to {self.high:g}"
        low = low or (f"of at least {self.low:g}" if self.low is not None else None)
        high = f"up to {self.high:g}" if self.high is not None else None
        return " ".join([text, " and ".join(part for part in (low, high) if part)]).strip()


def one_of(*choices: str) -> Rule:
    return Rule(kind=str, choices=choices)


AT_LEAST_0 = Rule(kind=int, low=0)
AT_LEAST_1 = Rule(kind=int, low=1)
AT_LEAST_1_OR_NULL = Rule(kind=int, low=1, null=True)
POSITIVE = Rule(kind=float, above=0)
NOT_NEGATIVE = Rule(kind=float, low=0)
NOT_NEGATIVE_OR_NULL = Rule(kind=float, low=0, null=True)
FRACTION = Rule(kind=float, low=0, high=1)
FLAG = Rule(kind=bool)
TEXT = Rule(kind=str)
TEXT_OR_NULL = Rule(kind=str, null=True)
SCALE = Rule(kind=float, above=0, high=1, count=2, ascending=True)
POSITIVE_RANGE = Rule(kind=float, above=0, count=2, ascending=True)
PER_CHANNEL = Rule(kind=float, count=0, choices=("auto",))

# Key -> rule. Keys that a chosen option does not have are passed over; `*` stands for any part of a key.
RULES: dict[str, Rule] = {
    "name": TEXT,
    "run_dir": TEXT,
    "resume": TEXT,
    "resume_changes": Rule(kind=str, count=0),
    "seed": AT_LEAST_0,
    "allowed_targets": Rule(kind=str, count=0),
    "dataset.root": TEXT_OR_NULL,
    "dataset.download": FLAG,
    "dataset.batch_size": AT_LEAST_1,
    "dataset.num_workers": AT_LEAST_0,
    "dataset.channels": AT_LEAST_1,
    "dataset.mean": PER_CHANNEL,
    "dataset.std": Rule(kind=float, above=0, count=0, choices=("auto",)),
    "dataset.*_size": AT_LEAST_1,
    "dataset.evaluation_resize": AT_LEAST_1,
    "dataset.max_bad_fraction": FRACTION,
    "dataset.scaled_decoding": FLAG,
    "dataset.val_fraction": Rule(kind=float, low=0, high=0.9),
    "augmentation.*_size": AT_LEAST_1,
    "augmentation.num_local_views": AT_LEAST_0,
    "augmentation.global_scale": SCALE,
    "augmentation.local_scale": SCALE,
    "augmentation.ratio": POSITIVE_RANGE,
    "augmentation.*_probability": FRACTION,
    "augmentation.blur_probability": Rule(kind=float, low=0, high=1, count=3),
    "augmentation.blur_sigma": POSITIVE_RANGE,
    "augmentation.brightness": NOT_NEGATIVE,
    "augmentation.contrast": NOT_NEGATIVE,
    "augmentation.saturation": NOT_NEGATIVE,
    "augmentation.hue": Rule(kind=float, low=0, high=0.5),
    "augmentation.solarize_threshold": Rule(kind=float, low=0, high=255),
    "augmentation.photometric_device": one_of("cpu", "device"),
    "augmentation.jitter_form": one_of("exact", "matrix"),
    "backbone.patch_size": AT_LEAST_1,
    "backbone.embed_dim": AT_LEAST_1,
    "backbone.depth": AT_LEAST_1,
    "backbone.num_heads": AT_LEAST_1,
    "backbone.drop_path_rate": Rule(kind=float, low=0, high=0.9),
    "backbone.pretrained": FLAG,
    "backbone.weights": TEXT_OR_NULL,
    "head.out_dim": Rule(kind=int, low=2),
    "head.hidden_dim": AT_LEAST_1,
    "head.bottleneck_dim": AT_LEAST_1,
    "head.num_layers": AT_LEAST_1,
    "head.batch_norm": FLAG,
    "head.norm_last_layer": FLAG,
    "loss.student_temp": POSITIVE,
    "loss.teacher_temp": POSITIVE,
    "loss.warmup_teacher_temp": POSITIVE,
    "loss.warmup_teacher_temp_epochs": NOT_NEGATIVE,
    "loss.center_momentum": FRACTION,
    "loss.weighting": one_of("pairs", "balanced", "adaptive"),
    "loss.local_weight": NOT_NEGATIVE,
    "loss.koleo_weight": NOT_NEGATIVE,
    "loss.implementation": one_of("auto", "plain", "fused", "sliced"),
    "loss.centering.momentum": FRACTION,
    "loss.centering.num_iterations": AT_LEAST_1,
    "ema.momentum": FRACTION,
    "optimizer.lr": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.momentum": FRACTION,
    "optimizer.betas": Rule(kind=float, low=0, high=1, count=2),
    "optimizer.eps": POSITIVE,
    "optimizer.trust": POSITIVE,
    "schedule.teacher_momentum.base": FRACTION,
    "schedule.teacher_momentum.final": FRACTION,
    "schedule.teacher_temp.base": POSITIVE,
    "schedule.teacher_temp.warmup_start": POSITIVE,
    "schedule.*.warmup_epochs": NOT_NEGATIVE,
    "schedule.*.warmup_start": NOT_NEGATIVE,
    "schedule.*.warmup_fraction": FRACTION,
    "schedule.*.cosine_fraction": FRACTION,
    "schedule.*.num_cycles": AT_LEAST_1,
    "schedule.*.decay": POSITIVE,
    "schedule.*.power": POSITIVE,
    "schedule.*.final": NOT_NEGATIVE,
    "trainer.epochs": AT_LEAST_1,
    "trainer.max_steps": AT_LEAST_1_OR_NULL,
    "trainer.limit_steps_per_epoch": AT_LEAST_1_OR_NULL,
    "trainer.limit_evaluation_samples": AT_LEAST_1_OR_NULL,
    "trainer.accumulate_steps": AT_LEAST_1,
    "trainer.lr_reference_batch": AT_LEAST_1_OR_NULL,
    "trainer.clip_mode": one_of("per_tensor", "global_norm"),
    "trainer.clip_norm": Rule(kind=float, low=0, null=True),
    "trainer.freeze_last_layer_epochs": AT_LEAST_0,
    "trainer.freeze_backbone_steps": AT_LEAST_0,
    "trainer.device": one_of("auto", "cpu", "cuda"),
    "trainer.precision": one_of("auto", "fp32", "tf32", "bf16", "fp16"),
    "trainer.memory": one_of("fast", "balanced", "low"),
    "trainer.parallel": one_of("ddp", "fsdp"),
    "trainer.compile": FLAG,
    "trainer.num_threads": AT_LEAST_1_OR_NULL,
    "trainer.save_every_steps": AT_LEAST_1_OR_NULL,
    "trainer.save_every_epochs": AT_LEAST_1_OR_NULL,
    "trainer.keep_checkpoints": AT_LEAST_1,
    "trainer.keep_every_epochs": AT_LEAST_1_OR_NULL,
    "trainer.on_save_error": one_of("warn", "stop"),
    "trainer.max_skipped_steps": AT_LEAST_0,
    "monitor.every_steps": AT_LEAST_1,
    "monitor.gradients_every": AT_LEAST_1,
    "monitor.on_collapse": one_of("warn", "stop", "off"),
    "monitor.report": FLAG,
    "monitor.health.patience_steps": AT_LEAST_1,
    "monitor.health.repeat_steps": AT_LEAST_1,
    "monitor.health.plateau_steps": AT_LEAST_1_OR_NULL,
    "monitor.health.max_confidence": FRACTION,
    "monitor.health.min_agreement": FRACTION,
    "monitor.health.min_effective_rank_ratio": FRACTION,
    "monitor.health.max_grad_norm_ratio": Rule(kind=float, low=1),
    "monitor.health.max_grad_norm": POSITIVE,
    "monitor.health.max_center_norm": NOT_NEGATIVE_OR_NULL,
    "monitor.health.max_loss": NOT_NEGATIVE_OR_NULL,
    "monitor.health.m*": NOT_NEGATIVE,
    "monitor.early_stopping.metric": TEXT_OR_NULL,
    "monitor.early_stopping.mode": one_of("auto", "max", "min"),
    "monitor.early_stopping.patience": AT_LEAST_1_OR_NULL,
    "monitor.early_stopping.min_delta": NOT_NEGATIVE,
    "monitor.early_stopping.restore_best": FLAG,
    "evaluation.*.every_epochs": AT_LEAST_1,
    "evaluation.*.max_samples": AT_LEAST_1,
    "evaluation.pictures.num_images": AT_LEAST_1,
    "evaluation.knn.neighbours": Rule(kind=int, low=1, count=0),
    "evaluation.*.temperature": POSITIVE,
    "evaluation.*.prefix": TEXT,
    "evaluation.*.root": TEXT_OR_NULL,
    "evaluation.*.image_size": AT_LEAST_1,
    "evaluation.linear.num_*": AT_LEAST_1,
    "evaluation.linear.epochs": AT_LEAST_1,
    "evaluation.linear.batch_size": AT_LEAST_1,
    "evaluation.linear.learning_rates": Rule(kind=float, above=0, count=0),
    "evaluation.linear.choice_fraction": Rule(kind=float, above=0, high=0.9),
    "evaluation.video_segmentation.short_side": AT_LEAST_1,
    "evaluation.video_segmentation.top_k": AT_LEAST_1,
    "evaluation.video_segmentation.num_last_frames": AT_LEAST_0,
    "evaluation.video_segmentation.radius": AT_LEAST_0,
    "logger.console.plain_every_s": NOT_NEGATIVE,
    "logger.*.finish_timeout_s": NOT_NEGATIVE,
    "logger.wandb.mode": one_of("online", "offline", "disabled"),
    "logger.wandb.project": TEXT,
    "logger.wandb.entity": TEXT_OR_NULL,
    "logger.wandb.name": TEXT_OR_NULL,
    "logger.wandb.group": TEXT_OR_NULL,
    "logger.wandb.tags": Rule(kind=str, count=0),
    "sweep.name": TEXT,
    "sweep.dir": TEXT,
    "sweep.base": Rule(kind=str, count=0),
    "sweep.axes": Rule(kind=str, count=0),
    "sweep.seeds": Rule(kind=int, low=0, count=0),
    "sweep.metric": TEXT,
    "sweep.direction": one_of("maximize", "minimize"),
    "sweep.on_failure": TEXT,
    "sweep.search": one_of("grid", "random", "optuna"),
    "sweep.num_trials": AT_LEAST_1_OR_NULL,
    "sweep.search_seed": AT_LEAST_0,
    "sweep.max_parallel": AT_LEAST_1_OR_NULL,
    "cluster.mem_gb": Rule(kind=float, above=0, null=True),
    "cluster.gpus_per_node": AT_LEAST_1_OR_NULL,
    "cluster.first_wait_s": NOT_NEGATIVE,
    "sweep.pruning.startup_trials": AT_LEAST_0,
    "sweep.pruning.warmup_epochs": AT_LEAST_0,
}


def rule_for(key: str) -> Rule | None:
    """The first rule of the table that fits the key."""
    return RULES.get(key) or next((rule for name, rule in RULES.items() if fnmatch.fnmatchcase(key, name)), None)
