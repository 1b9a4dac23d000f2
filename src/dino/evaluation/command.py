"""`dino evaluate`: the evaluators that need nothing but a backbone, on any weights and any dataset."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dino.config import build, compose, raw_settings
from dino.dataset import ImageDataset
from dino.evaluation.inputs import FeatureInputs, evaluation_folder
from dino.frozen import read_frozen
from dino.messages import ConfigError, did_you_mean, show
from dino.overrides import options_of, parsed
from dino.presets import leaves
from dino.processes import Processes
from dino.ranks import process_group
from dino.trained import TEACHER, Trained
from dino.training.assemble import prepare_process

NEED_A_RUN = ("label_free", "pictures", "validation_loss")  # student, loss or views, which only training has
OWN_IMAGES = ("retrieval", "copy_detection", "video_segmentation")  # they have a root of their own
NOT_OF_IMAGES = ("num_workers", "batch_size", "download", "max_bad_fraction", "global_size", "local_size")
MAX_WORD = 60  # letters of a word in the name of a folder
READ = ("dataset", "evaluation", "trainer", "seed")  # of the overrides


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on what."""

    dataset: str
    metrics: dict[str, float]
    seconds: dict[str, float]  # of each protocol
    path: Path | None  # of the file with all of it
    is_main: bool  # whether this is the rank that prints
    is_lost: bool  # whether the disk refused the file


def protocols() -> list[str]:
    """The options of `evaluation` that any weights can be given to."""
    return [option for option in options_of("evaluation") if option not in NEED_A_RUN]


def evaluate_trained(
    trained: Trained, run: Path | None, names: Sequence[str], overrides: Sequence[str] = ()
) -> Evaluation:
    """Runs the evaluators called `names`; under torchrun (`torchrun --no-python dino evaluate ...`) by all ranks.

    Args:
        trained: whose backbone is measured; images are prepared as it says, unless overrides say otherwise.
        run: the directory it comes from, which has the dataset and gets the results; None: the overrides say which
            dataset (`dataset=NAME`, or `dataset.root=PATH` for a folder), and nothing is written.
        overrides: as of train.py, of `dataset`, `evaluation`, `trainer` and `seed`.

    Raises:
        ValueError: for an unknown protocol or override, and for a dataset with other channels than the backbone.
    """
    unknown = [name for name in names if name not in protocols()]
    if unknown or not names:
        raise ValueError(f"--protocol {','.join(names)}: use one or more of {', '.join(protocols())}")
    config, about = _config(trained, run, names, overrides)
    dataset: ImageDataset = build(config, "dataset")
    evaluators = {name: build(config, f"evaluation.{name}") for name in names}
    options, processes = build(config, "trainer"), Processes.from_environment()
    precision = prepare_process(options, processes.local_rank)
    folder = None
    if run is not None and trained.step is not None:
        of_network = [trained.network] if trained.network != TEACHER else []
        folder = evaluation_folder(run, trained.step, "_".join([*of_network, *about]))
    inputs = FeatureInputs(
        backbone=trained.backbone.to(precision.device),
        dataset=dataset,
        device=precision.device,
        autocast=precision.autocast,
        seed=config.seed,
        limit_samples=options.limit_evaluation_samples,
        untrained=False,
        folder=folder,
    )
    metrics, seconds = dict[str, float](), dict[str, float]()
    with process_group(processes, precision.device):
        for name, evaluator in evaluators.items():
            started = time.perf_counter()
            metrics |= evaluator.evaluate(inputs)
            seconds[name] = time.perf_counter() - started
    path, is_lost = None if folder is None else folder / "results.json", False
    if processes.is_main and path is not None:
        content: dict[str, Any] = {"weights": trained.report.source, "network": trained.network, "step": trained.step}
        content |= {"dataset": dataset.name, "root": config.dataset.get("root"), "metrics": metrics, "seconds": seconds}
        content["settings"] = OmegaConf.to_container(config.evaluation, resolve=True)
        is_lost = not inputs.write("results", _added(path, content))
    return Evaluation(dataset.name, metrics, seconds, path, processes.is_main, is_lost)


def _added(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """`content` with what was found there before by other protocols."""
    try:
        before = json.loads(path.read_text())
        if before.get("root") != content["root"]:
            return content
        return content | {name: before[name] | content[name] for name in ("metrics", "seconds", "settings")}
    except (OSError, ValueError, KeyError, TypeError):
        return content


def _config(
    trained: Trained, run: Path | None, names: Sequence[str], words: Sequence[str]
) -> tuple[DictConfig, list[str]]:
    """Settings of dataset, evaluators and machine, and the words that tell this evaluation from that of the run: other
    images, prepared otherwise, or other settings of an evaluator."""
    overrides, problems = parsed(words)
    unread = [each for each in overrides if each.key_or_group.split(".")[0] not in READ]
    problems += [f"{each.input_line}: dino evaluate reads only {', '.join(READ)}" for each in unread]
    if problems:
        raise ConfigError(problems)
    groups = [each.input_line or "" for each in overrides if "." not in each.key_or_group]
    other_dataset = any(each.key_or_group == "dataset" for each in overrides)
    if run is None and not other_dataset:
        rooted = any(each.key_or_group == "dataset.root" for each in overrides)
        needy = [name for name in names if name not in OWN_IMAGES]
        if needy and not rooted:
            raise ValueError(
                f"--protocol {needy[0]}: these weights lie in no run, so say on which images: "
                "dataset=NAME, or dataset.root=PATH for a folder"
            )
        groups.append("dataset=folder")
    config = compose([*groups, f"evaluation=[{','.join(names)}]"])
    if run is not None:
        frozen = read_frozen(run / "config.yaml")
        config.trainer, config.allowed_targets = frozen.trainer, frozen.allowed_targets
        if not other_dataset:
            config.dataset = frozen.dataset
        for name in set(names) & set(frozen.evaluation):
            config.evaluation[name] = OmegaConf.merge(config.evaluation[name], frozen.evaluation[name])
    of_run = leaves(raw_settings(config))
    if run is not None:
        of_run = {key: value for key, value in of_run.items() if not key.startswith("dataset.")}
        of_run |= {f"dataset.{key}": value for key, value in leaves(raw_settings(frozen.dataset)).items()}
    prepared = trained.preparation
    colours = {"mean": prepared.mean, "std": prepared.std}
    sizes = {"evaluation_resize": prepared.resize, "evaluation_size": prepared.size}
    for key, value in (colours | sizes).items():
        config.dataset[key] = value
    if run is None and not other_dataset:
        config.dataset.channels = len(prepared.mean)
    typed = [each for each in overrides if "." in each.key_or_group]
    _apply(config, typed)
    if config.dataset.channels != len(prepared.mean):
        channels = len(prepared.mean)
        raise ValueError(f"dataset.channels={config.dataset.channels}: the backbone takes images of {channels}")
    return config, [] if run is None else _about(of_run, leaves(raw_settings(config)))


def _about(of_run: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Words for what differs and changes results; such as the names of folders may have."""
    changed = {key: value for key, value in here.items() if of_run.get(key) not in (value, "auto")}
    other_dataset = bool(changed.keys() & {"dataset._target_", "dataset.name", "dataset.root"})
    words = [str(here["dataset.name"])] if other_dataset else []
    for key, value in changed.items():
        group, _, name = key.partition(".")
        of_images = group == "dataset" and not other_dataset and name not in NOT_OF_IMAGES
        of_evaluator = group == "evaluation" and key.rpartition(".")[2] not in ("every_epochs", "prefix", "root")
        if of_images or of_evaluator:
            words.append(f"{name}={show(value)}")
        elif key == "trainer.limit_evaluation_samples":
            words.append("all" if value is None else f"limit={value}")
    return [re.sub(r"[^\w=.,-]+", "", word)[:MAX_WORD] for word in words]


def _apply(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Sets what was typed, on top of the settings of the run."""
    problems, known = [], leaves(raw_settings(config))
    for override in overrides:
        key, line = override.key_or_group, override.input_line
        if override.is_sweep_override() or override.is_delete() or override.is_add():
            problems.append(f"{line}: write key=value")
        elif key not in known:
            problems.append(f"{key}: there is no such key{did_you_mean(key, known)}")
        else:
            OmegaConf.update(config, key, override.value())
    if problems:
        raise ConfigError(problems)
