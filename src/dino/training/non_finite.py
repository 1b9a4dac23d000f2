"""Steps whose loss or gradient is not finite: counted, explained in a file, and at some point too many.

Shapes: B images, G global views, L local views, V = G + L, N images, K prototypes.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino.augmentation import ViewBatch
from dino.evaluation.features import evaluation_mode
from dino.model import Projection
from dino.run import NonFiniteError
from dino.runtime import Precision
from dino.training.step import StepOutput, TrainStep

log = logging.getLogger("dino")


@dataclass(frozen=True)
class _Pending:
    """A step whose `broken` flag is on its way to the host."""

    step: int
    window: Sequence[ViewBatch]
    output: StepOutput
    flag: Tensor  # on the host; valid once `arrived` has happened
    arrived: torch.Event | None


class NonFiniteWatch:
    """Learns of each step whether it was broken, without making the device wait.

    `TrainStep` has left everything as it was by then; this is about telling. On a CPU the flag is read at once. On a
    GPU it is copied to the host behind the step, and read when the next step has been queued: one step later.

    Args:
        max_skipped_steps: so many broken steps are passed over, in the whole run; one more ends it.
        directory: where `step_<n>.json` explains a broken step.
        rank: this process; every rank writes a file of its own.
    """

    def __init__(self, max_skipped_steps: int, directory: Path, rank: int = 0) -> None:
        self.max_skipped_steps = max_skipped_steps
        self.directory = directory
        self.rank = rank
        self.num_skipped = 0
        self.too_many: NonFiniteError | None = None  # what ends the run
        self._pending: _Pending | None = None

    def watch(self, step: int, window: Sequence[ViewBatch], output: StepOutput, train_step: TrainStep) -> int | None:
        """After step number `step` (from 1); returns the number of a step that is now known to be broken."""
        if output.broken.device.type == "cpu":
            self._pending = _Pending(step, window, output, output.broken, None)
            return self.settle(train_step)
        known = self.settle(train_step)
        flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(output.broken, non_blocking=True)
        arrived = torch.Event("cuda")
        arrived.record()
        self._pending = _Pending(step, window, output, flag, arrived)
        return known

    def settle(self, train_step: TrainStep) -> int | None:
        """Reads the flag that is still on its way, if any; comes before a checkpoint. Returns as `watch`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        if pending.arrived is not None:
            pending.arrived.synchronize()
        if not bool(pending.flag):
            return None
        self.num_skipped += 1
        path = self._explain(pending, train_step)
        left = self.max_skipped_steps - self.num_skipped
        message = f"step {pending.step}: the loss or a gradient is not finite; nothing was updated by it, see {path}"
        if left < 0:
            used_up = f"trainer.max_skipped_steps={self.max_skipped_steps} are used up"
            self.too_many = NonFiniteError(f"{message}; {used_up}")
        else:
            log.warning("%s; %d more are allowed", message, left)
        return pending.step

    def state_dict(self) -> dict[str, Any]:
        assert self._pending is None, "settle() comes first"
        return {"num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_skipped = state["num_skipped"]

    def _explain(self, pending: _Pending, train_step: TrainStep) -> Path:
        rank = f"_rank{self.rank}" if self.rank else ""
        path = self.directory / f"step_{pending.step:08d}{rank}.json"
        gradients = pending.arrived is None  # on a GPU the next step has taken their place
        diagnosis = diagnose(pending.step, pending.window, pending.output, train_step, gradients=gradients)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(diagnosis, indent=1) + "\n")
        except OSError as error:
            log.warning("the explanation of step %d cannot be written: %s", pending.step, error)
        return path


def diagnose(
    step: int, window: Sequence[ViewBatch], output: StepOutput, train_step: TrainStep, *, gradients: bool
) -> dict[str, Any]:
    """What is known of a broken step, in plain values; numbers that are not finite are texts ("nan", "inf").

    The layers' outputs are those of another forward pass over the last micro-batch of the step, in evaluation mode: it
    draws no random numbers and leaves all statistics of batch norm as they are.
    """
    student = train_step.whole_model().student
    parameters = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    terms = output.terms
    named = {"total": terms.total, "global": terms.global_term, "local": terms.local_term, "koleo": terms.koleo}
    norms = dict(zip(output.grad_names, output.grad_norms, strict=True))
    layers = _layers(student, train_step.precision, window[-1])
    return {
        "step": step,
        "sample_indices": [views.indices.tolist() for views in window],
        "loss": {name: _plain(value) for name, value in named.items() if value is not None},
        "grad_norm": _plain(output.grad_norm),
        "scheduled": output.scheduled,
        "student_temp": train_step.loss.student_temp,
        "precision": train_step.precision.name,
        "scale": train_step.scaler.get_scale(),
        "first_non_finite_layer": next((name for name, figures in layers.items() if figures["num_non_finite"]), None),
        "views": [_views(views) for views in window],
        "student_logits": layers["head.last_layer"],
        "layers": layers,
        "parameters": {name: _figures(parameter) for name, parameter in parameters.items()},
        "gradient_norms": {name: _plain(norm) for name, norm in norms.items()} if gradients else None,
    }


def _views(views: ViewBatch) -> dict[str, list[dict[str, Any]]]:
    groups = {"global": views.global_views, "local": views.local_views}
    return {name: [_figures(view) for view in group] for name, group in groups.items() if group is not None}


@torch.no_grad()
def _layers(student: nn.Module, precision: Precision, views: ViewBatch) -> dict[str, dict[str, Any]]:
    """Figures of the output of every layer of the student, in the order of the forward pass.

    The `qkv` of a ViT's last block is not among them: of that, only what the class tokens need is made.
    """
    layers: dict[str, dict[str, Any]] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Projection):
                output = output.logits()
            if isinstance(output, Tensor):
                layers.setdefault(name, _figures(output))

        return hook

    hooks = [m.register_forward_hook(note(name)) for name, m in student.named_modules() if not list(m.children())]
    try:
        with evaluation_mode(student), precision.autocast():
            student(views.global_views, views.local_views)
    finally:
        for handle in hooks:
            handle.remove()
    return layers


def _figures(tensor: Tensor) -> dict[str, Any]:
    values = tensor.detach().double()
    finite = torch.isfinite(values)
    kept = values[finite]
    return {
        "max_abs": _plain(values.abs().max()),
        "norm": _plain(values.norm()),
        "mean": _plain(kept.mean()) if len(kept) else None,
        "std": _plain(kept.std(correction=0)) if len(kept) else None,
        "num_non_finite": int((~finite).sum()),
    }


def _plain(value: Tensor) -> float | str:
    number = float(value.detach())
    return number if math.isfinite(number) else str(number)
