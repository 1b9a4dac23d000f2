"""Weights from a file into a backbone: all of them or an error, never a part and never a download.

Shapes: D features, C channels, P positions in a table.
"""

import argparse
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dino.backbone.base import Backbone
from dino.backbone.layouts import TOPS, Found, State, find_backbone
from dino.backbone.positions import grid_side, resize_positions
from dino.backbone.recognise import recognise

log = logging.getLogger("dino")

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # what a Hugging Face folder holds
FIRST_CONVOLUTIONS = ("patch_embed.proj.weight", "conv1.weight", "features.0.0.weight", "conv_stem.weight")
NUM_NAMED = 4  # names spelled out in an error
T = TypeVar("T")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded: `loaded` of `total` tensors of the backbone, and what was done to make them fit."""

    source: str
    layout: str
    loaded: int
    total: int
    ignored: tuple[str, ...]  # tensors on top of the backbone that the file also has
    notices: tuple[str, ...]

    def __str__(self) -> str:
        beside = f"; left aside {len(self.ignored)} tensors on top of the backbone" if self.ignored else ""
        notices = "".join(f"; {notice}" for notice in self.notices)
        return f"loaded {self.loaded} of {self.total} tensors from {self.source} ({self.layout}){beside}{notices}"


def load_weights(backbone: Backbone, path: str | Path, network: str = "teacher") -> LoadReport:
    """Loads a checkpoint of this project or of the original, or a timm, torchvision or Hugging Face backbone.

    A position table of another size is interpolated, a first convolution for another number of channels adapted, both
    with a notice. All else must fit: every tensor of the backbone is in the file and every one in the file is used,
    except what sits on top of a backbone (projection head, classifier).

    Args:
        path: a `.pt`, `.pth`, `.bin` or `.safetensors` file, or a Hugging Face folder with one. Never a URL.
        network: `teacher` or `student`, where the file has both.

    Raises:
        ValueError: for a missing or unreadable file, and for names or shapes that do not fit (naming some).
    """
    try:
        found = find_backbone(read_file(Path(path)), network)
    except ValueError as error:
        raise ValueError(f"backbone.weights={path}: {error}") from error
    return load_found(backbone, found, f"backbone.weights={path}")


def load_initial_weights(backbone: Backbone, path: str | None, pretrained: Callable[[], State] | None) -> None:
    """What the last lines of every backbone's constructor do: start from a file, from published weights, or neither.

    Args:
        pretrained: fetches published weights by their published names; None: not wanted.
    """
    if path is not None and pretrained is not None:
        raise ValueError(f"backbone.weights={path} and backbone.pretrained=true exclude each other; choose one")
    if path is not None:
        log.info("weights     %s", load_weights(backbone, path))
    if pretrained is not None:
        found = Found(fetch(pretrained), (), "pretrained")
        log.info("weights     %s", load_found(backbone, found, "backbone.pretrained=true"))


def fetch(download: Callable[[], T]) -> T:
    """Runs `download`, turning the many ways in which a download fails into one `ValueError`."""
    try:
        return download()
    except Exception as error:  # urllib, httpx, requests and the hub client each have their own
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"backbone.pretrained=true: the weights could not be fetched ({cause}); "
            "with a file at hand use backbone.weights=PATH"
        ) from error


def read_file(path: Path) -> object:
    """The content of a weight file on the CPU; runs no code from it.

    Raises:
        ValueError: if it is missing, no weight file, or would need code of its own to be read.
    """
    if path.is_dir():
        if (path / "checkpoints").is_dir():
            raise ValueError("it is a run directory; name a checkpoint in it, such as checkpoints/last.pt")
        inside = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not inside and (path / "status.json").is_file():
            raise ValueError("this run has saved no checkpoint yet")
        if not inside:
            raise ValueError(
                f"the folder is neither a run directory (no checkpoints) nor one of Hugging Face (no {FOLDER_FILES[0]})"
            )
        path = inside[0]
    if not path.is_file():
        raise ValueError("there is no such file (weights are read from local files only)")
    if path.suffix == ".onnx":
        raise ValueError("a graph for inference is not read as weights; use the file that it was made of")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # The original's checkpoints hold its parsed arguments: names and plain values, harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "the file is damaged, or holds more than tensors and plain values, which is not loaded"
        ) from error
    except Exception as error:  # zip, safetensors and pickle each have their own
        raise ValueError(f"not a readable weight file, or one that was cut short ({type(error).__name__})") from error


def load_found(backbone: Backbone, found: Found, source: str) -> LoadReport:
    """Puts `found` into the backbone, strictly; `source` opens the error messages.

    Raises:
        ValueError: for names or shapes that do not fit; the backbone is then unchanged.
    """
    target = backbone.published()
    wanted = target.state_dict()
    state, ignored = _split_top(found.state, wanted)
    state, notices = _fit(state, wanted)
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    misshapen = [
        f"{name} {list(value.shape)} instead of {list(wanted[name].shape)}"
        for name, value in state.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        fitting = len(wanted) - len(missing) - len(misshapen)
        details = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        only = f"only {fitting} of {len(wanted)} tensors fit"
        if fitting == len(wanted):
            only = f"all {fitting} tensors fit, but it has {len(unexpected)} more, so it is of another network"
        hint = _shape_in_words(found.state, type(backbone)) if misshapen else ""
        raise ValueError(f"{source}: {only} ({found.layout}); {details}{hint}")
    target.load_state_dict(state)
    return LoadReport(source, found.layout, len(state), len(wanted), (*found.ignored, *ignored), tuple(notices))


def _split_top(state: State, wanted: State) -> tuple[State, list[str]]:
    """The state without classifier and the like, and the names of those; a backbone's own names always stay."""
    ignored = [name for name in state if name not in wanted and name.startswith(TOPS)]
    return {name: value for name, value in state.items() if name not in ignored}, ignored


def _fit(state: State, wanted: State) -> tuple[State, list[str]]:
    """Adapts the tensors that may differ: position table, first convolution, counters of old batch norms."""
    state, notices = dict(state), []
    for name, target in wanted.items():
        value = state.get(name)
        if value is None:
            if name.endswith("num_batches_tracked"):  # files older than torch 0.4.1 lack it; nothing reads it
                state[name] = torch.zeros_like(target)
        elif name == "pos_embed" and value.shape != target.shape:
            side, new_side = grid_side(value), grid_side(target)
            if side and new_side and value.shape[-1] == target.shape[-1]:
                precise = value.to(torch.promote_types(value.dtype, torch.float32))
                state[name] = resize_positions(precise, new_side, new_side)
                notices.append(f"position table interpolated from {side} x {side} to {new_side} x {new_side} patches")
        elif name in FIRST_CONVOLUTIONS and value.ndim == 4 and value.shape[1] != target.shape[1]:
            adapted = adapt_channels(value, target.shape[1])
            if adapted.shape == target.shape:
                state[name] = adapted
                notices.append(f"{name} adapted from {value.shape[1]} to {target.shape[1]} channels")
    return state, notices


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution `[D, C, k, k]` for another number of channels `[D, channels, k, k]`.

    For one channel the sum, which gives a gray image the answer it had in colour; for others the channels repeated in
    turn and scaled by C / channels, which keeps the size of the answer.
    """
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    source = torch.arange(channels, device=weight.device) % weight.shape[1]
    return weight[:, source] * (weight.shape[1] / channels)


def _shape_in_words(state: State, kind: type[Backbone]) -> str:
    """What would fit, where that can be told; not the number of heads, which no tensor tells."""
    try:
        settings = recognise(state)
    except ValueError:
        return ""
    if not settings["_target_"].endswith(f".{kind.__name__}"):
        return ""
    shape = ("architecture", "stem", "patch_size", "embed_dim", "depth", "mlp_ratio")
    told = " ".join(f"backbone.{name}={settings[name]}" for name in shape if name in settings)
    return f"; the file is of {told}"


def _some(names: list[str]) -> str:
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
