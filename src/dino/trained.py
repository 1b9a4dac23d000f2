"""A backbone that has learned, out of any file that holds one, with what is needed to use it.

Shapes: C channels.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dino import checkpoint_files
from dino.backbone import Backbone, LoadReport
from dino.backbone.layouts import Found, find_backbone
from dino.backbone.positions import grid_side
from dino.backbone.recognise import BY_HAND, recognise
from dino.backbone.weights import FIRST_CONVOLUTIONS, load_found, read_file
from dino.config import CONF, build
from dino.messages import ConfigError
from dino.runtime import set_seeds
from dino.targets import Policy, locate, target_nodes
from dino.training.checkpoint import CheckpointStore

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LAST, BEST = "last", "best"
TEACHER, UNTRAINED = "teacher", "untrained"
# What may stand in the JSON file beside weights.
BESIDE = {"backbone": dict, "preparation": dict, "network": str, "step": int, "settings": dict, "num_heads": int}


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to an image before a backbone sees it: its short side resized, a square cut out, normalised."""

    mean: list[float]  # [C], of pixels in 0..1
    std: list[float]  # [C]
    resize: int  # short side [pixels]
    size: int  # side of the square [pixels]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A backbone with its weights, in evaluation mode on the CPU."""

    backbone: Backbone
    settings: dict[str, Any]  # of the backbone: `_target_` and its arguments, none of which names weights
    preparation: Preparation
    report: LoadReport
    file: Path  # that was read
    network: str  # student | teacher | untrained
    step: int | None  # of the run; None where the file does not say
    run_settings: dict[str, Any]  # dotted key -> value of all that changes results; empty for files of others

    @property
    def image_size(self) -> int:
        """Side of the images that the backbone is at home with: that of its position table, if it has one [pixels]."""
        return int(self.settings.get("image_size", self.preparation.size))

    def at_size(self, size: int) -> "Trained":
        """The same network for square images of `size` pixels: a position table is resampled to them once and for all.

        Raises:
            ValueError: for a size that does not divide into patches.
        """
        settings = dict(self.settings)
        if "image_size" in settings:
            settings["image_size"] = size
        self.backbone.check_size(size, size)
        backbone = _built(settings, _allowed_targets(self.file))
        load_found(backbone, Found(dict(self.backbone.published().state_dict()), (), "resampled"), str(self.file))
        scale = size / self.preparation.size
        prepared = dataclasses.replace(self.preparation, size=size, resize=round(self.preparation.resize * scale))
        return dataclasses.replace(self, backbone=backbone, settings=settings, preparation=prepared)

    def untrained(self, seed: int = 0) -> "Trained":
        """The same network with fresh weights."""
        set_seeds(seed)
        fresh = _built(self.settings, _allowed_targets(self.file))
        notice = f"freshly initialised, of the shape of {self.file}"
        report = LoadReport(str(self.file), "none", 0, self.report.total, (), (notice,))
        return dataclasses.replace(self, backbone=fresh, report=report, network=UNTRAINED, step=None)


def load_trained(
    path: Path, *, network: str = "teacher", checkpoint: str = LAST, backbone: str | None = None
) -> Trained:
    """The backbone in a run directory, a checkpoint of ours, one of our exports, or a file of the original, timm,
    torchvision or Hugging Face (a folder of the latter, too).

    All tensors are loaded, or none: see `load_weights`. Nothing is downloaded, and no code in a file is run.

    Args:
        path: what to load.
        network: `teacher` or `student`, where the file has both.
        checkpoint: `last`, `best` or the number of a step, where `path` is a run directory.
        backbone: an option of conf/backbone, or `timm/NAME`, for files that do not tell what they hold.

    Raises:
        ValueError: for a file that is missing, damaged or of another kind, and for weights that do not fit.
    """
    file = _chosen(path, checkpoint)
    try:
        content = read_file(file)
        found = find_backbone(content, network)
        beside = _beside(file, content)
        settings = _settings(backbone, beside, found)
        if not found.both_possible:  # which of the two it is, only what lies beside it can tell
            network = _known_network(beside.get("network"), network)
        built = _built(settings, _allowed_targets(file))
        preparation = _preparation(beside, settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    report = load_found(built, found, str(file))
    told = backbone is not None or "backbone" in beside or beside.get("num_heads") is not None
    if "num_heads" in settings and not told:
        notice = f"{settings['num_heads']} attention heads, as wide as published ones; --backbone names others"
        report = dataclasses.replace(report, notices=(*report.notices, notice))
    return Trained(
        backbone=built,
        settings=settings,
        preparation=preparation,
        report=report,
        file=file,
        network=network,
        step=beside.get("step"),
        run_settings=beside.get("settings", {}),
    )


def _known_network(of_file: object, wanted: str) -> str:
    if of_file is None or of_file == wanted or wanted == TEACHER:
        return str(of_file or wanted)
    raise ValueError(f"--network {wanted}: it holds the {of_file} alone")


def _allowed_targets(file: Path) -> list[str]:
    """Packages of the user's own that a run was allowed to build from, where the file lies in a run."""
    config = file.resolve().parent.parent / "config.yaml"
    try:
        content = OmegaConf.load(config) if config.is_file() else None
        return list(content.get("allowed_targets") or []) if isinstance(content, DictConfig) else []
    except Exception:  # YAML's errors and OmegaConf's have no common base; then it is no run's
        return []


def _built(settings: Mapping[str, Any], allowed: Sequence[str] = ()) -> Backbone:
    """Only a backbone, from plain values: nothing else that a file names is called."""
    name = settings.get("_target_")
    try:
        target = locate("backbone", name, Policy(tuple(allowed), frozenset()))  # type: ignore[arg-type]  # it refuses
    except ConfigError:
        target = object
    if not (isinstance(target, type) and issubclass(target, Backbone)):
        raise ValueError(f"it names {name}, which is no backbone of this project; {BY_HAND}")
    inner = [node["_target_"] for key, node in target_nodes(dict(settings)) if key]
    if inner:
        raise ValueError(f"it names {inner[0]} inside of its backbone, which takes plain values alone")
    config = OmegaConf.create({"backbone": dict(settings), "allowed_targets": list(allowed)})
    backbone: Backbone = build(config, "backbone")
    return backbone.eval().requires_grad_(False)


def _chosen(path: Path, checkpoint: str) -> Path:
    """The file to read; a folder of Hugging Face stays a folder.

    Raises:
        ValueError: if there is nothing at `path`, or no such checkpoint in the run.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such run directory or file (nothing is downloaded)")
    folder = path / "checkpoints"
    if not folder.is_dir():
        if checkpoint != LAST:
            raise ValueError(
                f"--checkpoint {checkpoint}: {path} is no run directory, so there is nothing to choose from"
            )
        if path.is_file() and path.with_suffix(".json").is_file() and checkpoint_files.NAME.fullmatch(path.name):
            _refuse_damage(path)
        return path
    store = CheckpointStore(folder, keep=1)
    if checkpoint == LAST:
        newest = store.newest_valid()
        if newest is None:
            raise ValueError(f"{path}: the run has no checkpoint yet")
        return newest
    if checkpoint == BEST:
        chosen = store.best()
        if chosen is None:
            raise ValueError(f"{path}: the run has no best checkpoint; use --checkpoint last, or the number of a step")
    elif checkpoint.isdecimal():
        chosen = checkpoint_files.checkpoint_path(folder, int(checkpoint))
    else:
        raise ValueError(f"--checkpoint {checkpoint}: use last, best or the number of a step")
    if not chosen.is_file():
        steps = ", ".join(str(checkpoint_files.step_of(file)) for file in checkpoint_files.files(folder)) or "none"
        raise ValueError(f"--checkpoint {checkpoint}: {path} has no checkpoint of that step; it has {steps}")
    _refuse_damage(chosen)
    return chosen


def _refuse_damage(file: Path) -> None:
    problem = checkpoint_files.find_problem(file)
    if problem is not None:
        raise ValueError(f"{file}: the checkpoint is damaged: {problem}")


def _beside(file: Path, content: object) -> dict[str, Any]:
    """What is known beside the tensors: `backbone`, `preparation`, `network`, `step`, `settings`, `num_heads`.

    Of our checkpoints from themselves, of our exports from the JSON beside them, of Hugging Face's from its config.
    """
    if isinstance(content, Mapping) and isinstance(content.get("settings"), Mapping):
        settings = dict(content["settings"])
        part = {key.removeprefix("backbone."): value for key, value in settings.items() if key.startswith("backbone.")}
        colours = {name: settings.get(f"dataset.{name}") for name in ("mean", "std")}
        colours = content.get("normalization", colours)
        if not all(isinstance(values, list) for values in colours.values()):
            raise ValueError("it is of an older version, which did not say how images were normalised; resume the run")
        preparation = colours | {name: settings[f"dataset.evaluation_{name}"] for name in ("resize", "size")}
        return {"backbone": part, "preparation": preparation, "step": content["step"], "settings": settings}
    if file.is_dir():
        if ours := _known(_read_json(file / "dino.json")):
            return ours
        config, processor = _read_json(file / "config.json"), _read_json(file / "preprocessor_config.json")
        known: dict[str, Any] = {"num_heads": config.get("num_attention_heads")}
        sizes = _processor_sizes(processor, config.get("image_size"))
        if "image_mean" in processor and "image_std" in processor and sizes:
            known["preparation"] = {"mean": processor["image_mean"], "std": processor["image_std"], **sizes}
        return known
    return _known(_read_json(file.with_suffix(".json")))


def _processor_sizes(processor: Mapping[str, Any], image_size: object) -> dict[str, int]:
    """Of an image processor of Hugging Face: what is cut out, and the short side before; empty where it does not say.

    One that squeezes whole images into a square counts as one that cuts squares out: for square images it is.
    """
    resize, cut = processor.get("size"), processor.get("crop_size") if processor.get("do_center_crop") else None
    resize, cut = ({"height": each} if isinstance(each, int) else each or {} for each in (resize, cut))
    size = cut.get("height", resize.get("height", image_size))
    short = resize.get("shortest_edge", resize.get("height", size))
    return {"size": size, "resize": max(size, short)} if isinstance(size, int) and isinstance(short, int) else {}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} beside it is not JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _known(content: Mapping[str, Any]) -> dict[str, Any]:
    """What of a JSON file is of the kind that an export writes; it may be somebody else's."""
    return {key: content[key] for key, kind in BESIDE.items() if isinstance(content.get(key), kind)}


def _settings(backbone: str | None, beside: Mapping[str, Any], found: Found) -> dict[str, Any]:
    """Of the backbone, without what would fetch weights: as the user says, as the file says, or as its tensors tell."""
    if backbone is not None:
        settings = _named(backbone, found)
    else:
        settings = beside["backbone"] if "backbone" in beside else recognise(found.state, beside.get("num_heads"))
    return {key: value for key, value in settings.items() if key not in ("weights", "pretrained")}


def _named(backbone: str, found: Found) -> dict[str, Any]:
    """The settings of an option of conf/backbone or of a network of timm, at the channels and size of the weights."""
    first = next((found.state[name] for name in FIRST_CONVOLUTIONS if name in found.state), None)
    channels = {} if first is None else {"channels": first.shape[1]}
    if backbone.startswith("timm/"):
        name = backbone.removeprefix("timm/")
        target = {"_target_": "dino.backbone.TimmBackbone", "model_name": name}
        return target | channels | _image_size(found, None)
    options = CONF / "backbone"
    if not (options / f"{backbone}.yaml").is_file() or backbone == "timm":
        known = ", ".join(sorted(option.stem for option in options.glob("*.yaml") if option.stem != "timm"))
        raise ValueError(f"--backbone {backbone}: use {known}, or timm/NAME")
    written = OmegaConf.to_container(OmegaConf.load(options / f"{backbone}.yaml"), resolve=False)
    assert isinstance(written, dict)
    settings: dict[str, Any] = {str(key): value for key, value in written.items() if not str(value).startswith("${")}
    settings |= channels
    return settings | _image_size(found, settings.get("patch_size"))


def _image_size(found: Found, patch_size: int | None) -> dict[str, int]:
    """That of the position table in the file, if it has one."""
    side, patches = grid_side(found.state.get("pos_embed", torch.empty(0))), found.state.get("patch_embed.proj.weight")
    if side is None or (patch_size is None and patches is None):
        return {}
    return {"image_size": side * (patch_size or patches.shape[-1])}  # type: ignore[union-attr]


def _preparation(beside: Mapping[str, Any], settings: Mapping[str, Any]) -> Preparation:
    """As the file says, otherwise the field's habit: ImageNet's colours, the short side 8 / 7 of the square."""
    if "preparation" in beside:
        try:
            return Preparation(**beside["preparation"])
        except TypeError as error:
            raise ValueError(f"what lies beside it says how to prepare images, but not all of it ({error})") from error
    size = settings.get("image_size", 224)
    channels = settings.get("channels", 3)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ([0.5] * channels, [0.5] * channels)
    return Preparation(mean=mean, std=std, resize=size * 8 // 7, size=size)
