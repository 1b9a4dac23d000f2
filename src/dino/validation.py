"""What can be known to be wrong before data or models, in two stages.

`check` needs the composed config alone: values (`dino.rules`), keys against one another, paths, names of targets.
`target_problems` checks every key against the signatures of the targets, importing only what has to be.
"""

import fnmatch
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dino import config as configuration
from dino.config import TOP_LEVEL_KEYS, policy, raw_settings, read_keys
from dino.messages import ConfigError, show
from dino.overrides import compose_or_explain, options_of, unknown_key
from dino.presets import keys_by_hand, leaves
from dino.rules import rule_for
from dino.targets import (
    ANY_VALUE,
    RESERVED,
    name_problem,
    node_problems,
    parameters_of,
    takes_anything,
    target_nodes,
)

# A run needs one object of each; `evaluation` and `logger` may be empty.
NEEDED = (
    *("dataset", "augmentation", "backbone", "head", "loss", "ema", "optimizer", "trainer", "monitor"),
    *(f"schedule.{name}" for name in ("lr", "weight_decay", "teacher_momentum", "teacher_temp")),
)
CONTAINERS = ("evaluation", "logger", "schedule")
GLOBAL_GROUPS = ("experiment", "debug", "recipe")  # their files set keys of other groups


@dataclass
class Findings:
    """Problems stop the run, warnings are printed."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def checked(overrides: Sequence[str], *, paths: bool = True) -> tuple[DictConfig, list[str]]:
    """The config of these overrides (with Hydra's node), and warnings.

    Args:
        paths: data, checkpoint and weights must be there.

    Raises:
        ConfigError: with all problems that were found.
    """
    config, problems = compose_or_explain(overrides)
    left_out = [word.partition("=")[0] for word in overrides if any(each.startswith(f"{word}: ") for each in problems)]
    findings = check(config, paths=paths, without=left_out) if config is not None else Findings()
    if config is None or problems or findings.problems:
        raise ConfigError(problems + findings.problems)
    if problems := target_problems(config):
        raise ConfigError(problems)
    return config, findings.warnings


# ---------------------------------------------------------------------- first stage


@dataclass(frozen=True)
class _Config:
    """A composed config, taken apart. `values` holds the leaves that could be resolved and keep their rule."""

    composed: DictConfig
    raw: dict[str, Any]
    values: dict[str, Any]
    by_hand: frozenset[str]

    def name(self, key: str) -> str:
        """The key that a person would set: the one that `key` reads, if it only reads one."""
        value = self.raw[key]
        is_reference = (
            isinstance(value, str) and value.startswith("${") and value[2:-1].replace(".", "_").isidentifier()
        )
        return value[2:-1] if is_reference else key


def check(config: DictConfig, *, paths: bool = True, without: Collection[str] = ()) -> Findings:
    """Everything wrong with a composed config that shows without importing a target.

    Args:
        paths: data, checkpoint and weights must be there.
        without: keys of which nothing is said, since what was typed for them could not be used.
    """
    raw = leaves(raw_settings(config))
    values, problems, unresolved = {}, [], []
    for key, written in raw.items():
        if key in without:
            continue
        try:
            value = OmegaConf.select(config, key, throw_on_missing=True)
        except MissingMandatoryValue:
            problems.append(f"{key}: a value is needed; write {key}=...")
            continue
        except OmegaConfBaseException as error:
            unresolved.append(f"{key}={written}: {str(error).splitlines()[0]}")
            continue
        value = OmegaConf.to_container(value) if isinstance(value, (DictConfig, ListConfig)) else value
        rule = None if is_interpolated(written) else rule_for(key)
        if rule is not None and not rule.accepts(value):
            problems.append(f"{key}={show(value)}: use {rule}")
        else:
            values[key] = value
    parts = _Config(config, raw, values, by_hand(config))
    for find in (_structure, _target_names, _warmups, _sizes, _combinations):
        problems += find(parts)
    problems += _paths(values) if paths else []
    return Findings(problems or unresolved, list(_warnings(values)))


def by_hand(config: DictConfig) -> frozenset[str]:
    """The keys that a person set, where the config still has Hydra's node to tell."""
    return keys_by_hand(configuration.CONF, config.hydra) if "hydra" in config else frozenset()


def is_interpolated(written: Any) -> bool:
    return "${" in str(written)


def _structure(config: _Config) -> Iterator[str]:
    """Groups that a run needs, and leaves that belong to no object."""
    for group in NEEDED:
        if f"{group}._target_" not in config.raw:
            where = group.replace(".", "/")
            yield f"{where}: a run needs one; choose {' or '.join(f'{where}={o}' for o in options_of(where))}"
    nodes = [key.removesuffix("._target_") for key in config.raw if key.endswith("._target_")]
    for key, value in config.raw.items():
        group = key.split(".")[0]
        if group in GLOBAL_GROUPS:
            yield f"{group}: its file in conf/{group} must begin with '# @package _global_', as it sets keys of a run"
            continue
        parent = key.rpartition(".")[0]
        if key in TOP_LEVEL_KEYS or any(f"{key}.".startswith(f"{node}.") for node in nodes):
            continue
        if key in CONTAINERS and value == {}:
            continue
        if parent in CONTAINERS or key in CONTAINERS:
            yield f"{key}={show(value)}: this is an object with settings of its own; to leave it out write ~{key}"
        elif key not in NEEDED and parent not in NEEDED:
            yield unknown_key(key)


def _target_names(config: _Config) -> Iterator[str]:
    allowed = policy(config.composed)
    for key, value in config.values.items():
        if key.endswith("._target_") and (problem := name_problem(key.removesuffix("._target_"), value, allowed)):
            yield problem


def _warmups(config: _Config) -> Iterator[str]:
    epochs = config.values.get("trainer.epochs")
    if epochs is None:
        return
    for key in fnmatch.filter(config.values, "schedule.*.warmup_epochs"):
        warmup, name = config.values[key], config.name(key)
        if isinstance(warmup, (int, float)) and warmup > epochs:
            yield (
                f"{name}={show(warmup)}: the warm-up is longer than the run of trainer.epochs={epochs}; "
                f"use {name}={epochs} or less, or trainer.epochs={math.ceil(warmup)} or more"
            )


def _sizes(config: _Config) -> Iterator[str]:
    """View sizes that are no multiple of the patch. Sizes of the dataset are fitted, unless a person set them."""
    values = config.values
    patch = values.get("backbone.patch_size", 1)
    if not isinstance(patch, int) or patch < 1:
        return
    size = values.get("dataset.evaluation_size")
    if isinstance(size, int) and size % patch and any(key.startswith("evaluation.") for key in config.raw):
        yield _not_a_multiple("dataset.evaluation_size", size, patch)
    for view in ("global_size", "local_size"):
        if view == "local_size" and values.get("augmentation.num_local_views") == 0:
            continue
        for key in (f"augmentation.{view}", f"dataset.{view}"):
            size = values.get(key)
            if not isinstance(size, int) or size % patch == 0:
                continue
            if key.startswith("augmentation.") or key in config.by_hand:
                yield _not_a_multiple(key, size, patch)


def _not_a_multiple(key: str, size: int, patch: int) -> str:
    below = size // patch * patch
    valid = f"{below} and {below + patch}" if below else f"{patch}"
    return f"{key}={size}: not a multiple of backbone.patch_size={patch}; nearest valid: {valid}"


def _combinations(config: _Config) -> Iterator[str]:
    """Keys that are right by themselves and wrong together."""
    values = config.values
    width, heads = values.get("backbone.embed_dim"), values.get("backbone.num_heads")
    if isinstance(width, int) and isinstance(heads, int) and width % heads:
        yield f"backbone.num_heads={heads}: backbone.embed_dim={width} must be a multiple of it"
    resize, size = values.get("dataset.evaluation_resize"), values.get("dataset.evaluation_size")
    if isinstance(resize, int) and isinstance(size, int) and resize < size:
        yield f"dataset.evaluation_resize={resize}: at least dataset.evaluation_size={size}, which is cut from it"
    for key in ("dataset.mean", "dataset.std"):
        numbers, channels = values.get(key), values.get("dataset.channels")
        if isinstance(numbers, list) and isinstance(channels, int) and len(numbers) != channels:
            yield f"{key}={show(numbers)}: one number for each of dataset.channels={channels} is needed, or auto"
    precision = values.get("trainer.precision")
    if precision in ("fp16", "tf32") and values.get("trainer.device") == "cpu":
        yield f"trainer.precision={precision}: for GPUs only; with trainer.device=cpu use bf16, fp32 or auto"
    if values.get("trainer.parallel") == "fsdp":
        yield from _sharded(values)
    steps = values.get("trainer.accumulate_steps", 1)
    if steps > 1:
        instead = f"use trainer.accumulate_steps=1 and dataset.batch_size={values.get('dataset.batch_size', 1) * steps}"
        if str(values.get("loss.centering._target_")).endswith("SinkhornKnopp"):
            yield (
                f"trainer.accumulate_steps={steps}: loss/centering=sinkhorn balances the targets over the whole batch, "
                f"so micro-batches are not equal to it; {instead}, or loss/centering=ema"
            )
        if (values.get("loss.koleo_weight") or 0) > 0:
            yield (
                f"trainer.accumulate_steps={steps}: loss.koleo_weight={show(values['loss.koleo_weight'])} compares the "
                f"images of the whole batch, so micro-batches are not equal to it; {instead}, or loss.koleo_weight=0"
            )


def _sharded(values: Mapping[str, Any]) -> Iterator[str]:
    """What networks that are divided among the ranks do not go with."""
    if str(values.get("optimizer._target_")).endswith("LARS"):
        yield "trainer.parallel=fsdp: optimizer=lars needs norms of whole weights; use trainer.parallel=ddp, or adamw"
    if values.get("trainer.compile"):
        yield "trainer.parallel=fsdp: not with trainer.compile=true; use trainer.compile=false, or trainer.parallel=ddp"
    if values.get("trainer.precision") == "fp16":
        yield "trainer.parallel=fsdp: not with trainer.precision=fp16; use bf16 or fp32, or trainer.parallel=ddp"


def takes_files(folder: Path) -> bool:
    """Tried, since permissions say nothing of what root may do in /proc or on a disk that is read-only."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _paths(values: Mapping[str, Any]) -> Iterator[str]:
    """Paths at which nothing lies, or nothing can be written."""
    name, run_dir = str(values.get("name")), values.get("run_dir")
    if not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts:
        yield f"name={name}: it is a part of the run's path; give one that is not empty, without .. or a leading /"
    if run_dir is not None and not str(run_dir).strip():
        yield "run_dir=: it is empty; give the folder for the files of the run, or leave it out"
    elif run_dir is not None:
        folder = Path(run_dir).absolute()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir() or not takes_files(existing):
            yield f"run_dir={run_dir}: {existing} is not a folder that can be written to; give another run_dir"
    root = values.get("dataset.root")
    if root is None and "dataset.root" in values:
        yield "dataset.root=null: say where the images are, dataset.root=PATH"
    elif root is not None and not values.get("dataset.download") and not Path(root).expanduser().exists():
        fetch = ", or fetch the data with dataset.download=true" if "dataset.download" in values else ""
        yield f"dataset.root={root}: there is no such file or folder; give dataset.root=PATH{fetch}"
    resume = values.get("resume", "auto")
    if resume not in ("auto", "never") and not Path(resume).is_file():
        what = "a directory, not a checkpoint" if Path(resume).is_dir() else "there is no such checkpoint"
        yield f"resume={resume}: {what}; use auto, never or the path of a checkpoint, such as checkpoints/last.pt"
    weights = values.get("backbone.weights")
    if weights is not None and not Path(weights).expanduser().exists():
        yield f"backbone.weights={weights}: there is no such file"
    frozen = values.get("trainer.freeze_backbone_steps") or 0
    # Not where there is no such key: a backbone of somebody else's may have other ways to start.
    if frozen > 0 and "backbone.weights" in values and weights is None and not values.get("backbone.pretrained"):
        yield (
            f"backbone.weights=null: trainer.freeze_backbone_steps={frozen} keeps the backbone as it begins; say what "
            "to go on from, backbone.weights=FILE or backbone.pretrained=true, or use trainer.freeze_backbone_steps=0"
        )


def _warnings(values: Mapping[str, Any]) -> Iterator[str]:
    student = values.get("loss.student_temp")
    if values.get("ema.momentum") == 1:
        yield "ema.momentum=1: the teacher never changes, so that the student learns what an untrained network says"
    steps, backbone = values.get("trainer.accumulate_steps", 1), str(values.get("backbone._target_"))
    if steps > 1 and (values.get("head.batch_norm") or backbone.endswith("ConvolutionalBackbone")):
        yield f"trainer.accumulate_steps={steps}: batch norm sees one micro-batch at a time, not all images of a step"
    for key in ("loss.teacher_temp", "loss.warmup_teacher_temp"):
        teacher = values.get(key)
        if student is not None and teacher is not None and student <= teacher:
            yield (
                f"loss.student_temp={show(student)} is not above {key}={show(teacher)}: the teacher is meant to be "
                "sharper than the student, otherwise the targets carry little"
            )
            return


# ---------------------------------------------------------------------- second stage


def target_problems(config: DictConfig) -> list[str]:
    """Keys that their target does not take, arguments that it lacks, values of the wrong type.

    A target is imported only where its source does not tell its signature, and nothing was found before.

    Values that are read from elsewhere are checked where they are written; some of those (`mean: auto`) are replaced
    when the run knows them.
    """
    settings = raw_settings(config)
    allowed = policy(config)
    nodes = list(target_nodes(_with_any_value(settings)))
    for imports in (False, True):
        problems = []
        for key, node in nodes:
            try:
                parameters = parameters_of(key, node["_target_"], allowed, imports=imports)
            except ConfigError as error:
                problems += error.problems
            else:
                problems += [] if parameters is None else node_problems(key, node, allowed, parameters)
        if problems:
            return problems
    return list(_without_effect(config, settings))


def _with_any_value(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {key: _with_any_value(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_with_any_value(value) for value in settings]
    return ANY_VALUE if is_interpolated(settings) else settings


def _without_effect(config: DictConfig, settings: dict[Any, Any]) -> Iterator[str]:
    """Keys that a person set and that nothing reads with these options (`loss.center_momentum` with Sinkhorn)."""
    by, read, allowed = by_hand(config), read_keys(config), policy(config)
    for key, node in target_nodes(settings):
        parameters = parameters_of(key, node["_target_"], allowed, imports=True)
        assert parameters is not None
        for name in set(node) - set(parameters) - set(RESERVED):
            full = f"{key}.{name}"
            if full in by - read and not takes_anything(parameters):
                yield f"{full}: has no effect with these options; nothing reads it"
