"""From the words of a command line to a sweep on disk whose trials are frozen: none is composed again later."""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from dino.config import build, fingerprint, save_config
from dino.messages import ConfigError, show
from dino.overrides import parsed
from dino.sweep.clusters import built
from dino.sweep.manifest import MANIFEST, Manifest, Trial, refuse_without_locks
from dino.sweep.plan import Point, Sweep, axes_of, points_of, probes_of
from dino.sweep.snapshot import take_snapshot
from dino.validation import checked

NOT_OF_A_TRIAL = ("sweep", "cluster")  # groups and keys of the sweep itself
SEARCH = "optuna"  # chooses its points while trials run; all others are planned at once


@dataclass(frozen=True)
class Request:
    """What was typed behind `submit`: the sweep and where it runs, and the overrides that all trials share."""

    sweep: Sweep
    cluster: dict[str, Any]
    base: list[str]


def read_request(words: Sequence[str]) -> Request:
    """Composes the groups `sweep` (default: `default`) and `cluster` (`local`); all other words are for the trials.

    A setting that is typed wins over the axis of the same key; several values make it an axis.

    Raises:
        ConfigError: for words that cannot be used.
    """
    overrides, problems = parsed(words)
    if problems:
        raise ConfigError(problems)
    own: list[str] = []
    typed: list[tuple[str, str]] = []
    axes: list[tuple[str, str]] = []
    for override in overrides:
        line, key = override.input_line or "", str(override.key_or_group)
        if key == "seed":
            problems.append(f"{line}: a sweep has a list of them; write sweep.seeds=[{line.partition('=')[2]}]")
        elif key == "run_dir":
            problems.append(f"{line}: every trial has a directory of its own; set sweep.dir instead")
        elif override.is_hydra_override():
            problems.append(f"{line}: sweep.py does not go through Hydra's launchers; choose cluster=...")
        elif key.split(".")[0] in NOT_OF_A_TRIAL:
            if override.is_sweep_override():
                problems.append(f"{line}: one value is needed, or a list: '{key}=[{line.partition('=')[2]}]'")
            own.append(line)
        else:
            (axes if override.is_sweep_override() else typed).append((key, line))
    if problems:
        raise ConfigError(problems)
    for group, default in (("cluster", "local"), ("sweep", "default")):
        if not any(line.startswith(f"{group}=") for line in own):
            own.insert(0, f"{group}={default}")
    config, _ = checked(own, paths=False)
    settings = OmegaConf.to_container(config.sweep, resolve=True)
    assert isinstance(settings, dict)
    taken = {key for key, _ in [*typed, *axes]}
    kept = [axis.line for axis in axes_of(settings["axes"]) if axis.key not in taken]
    twice = {key for key, _ in typed} & {key for key, _ in axes}
    problems += [f"{key}: given twice; write it once, with all its values" for key in sorted(twice)]
    zipped = {axis.key: group for group in settings["zipped"] for axis in axes_of(group)}
    for key in sorted(taken & set(zipped)):
        problems.append(f"{key}: sweep.zipped={show(zipped[key])} varies it; change that, or leave {key} out")
    if problems:
        raise ConfigError(problems)
    with open_dict(config):
        config.sweep.axes = [*kept, *(line for _, line in axes)]
        config.sweep.base = [*settings["base"], *(line for _, line in typed)]
    sweep: Sweep = build(config, "sweep")
    cluster = OmegaConf.to_container(config.cluster, resolve=True)
    assert isinstance(cluster, dict)
    return Request(sweep, {str(key): value for key, value in cluster.items()}, sweep.base)


def plan(words: Sequence[str]) -> tuple[Manifest, list[str]]:
    """The sweep, its trials frozen, its code copied, its manifest written; and warnings. On an error nothing is left.

    Raises:
        ConfigError: for anything wrong with any trial.
    """
    request = read_request(words)
    searches = request.sweep.search == SEARCH
    if searches and request.cluster["_target_"].endswith("InProcessCluster"):
        raise ConfigError([f"cluster=debug: sweep.search={SEARCH} needs a process of its own; use cluster=local"])
    built(request.cluster).check()
    folder = Path(request.sweep.dir).absolute()
    if (folder / MANIFEST).exists():
        raise ConfigError([f"sweep.dir={folder}: a sweep is there already; sweep.py resume goes on with it"])
    manifest = Manifest(
        folder=folder,
        name=request.sweep.name,
        created=time.time(),
        command=["python", *sys.argv],
        cwd=str(Path.cwd()),
        base=request.base,
        sweep=asdict(request.sweep),
        cluster=request.cluster,
    )
    points = [] if searches else points_of(request.sweep)
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"sweep.dir={folder}: this folder cannot be made ({error.strerror})"]) from None
    try:
        refuse_without_locks(folder)
        if searches:
            from dino.sweep.search import open_study  # optuna takes a second

            open_study(folder, manifest.sweep)
            _, warnings = composed(manifest.base, probes_of(request.sweep))
        else:
            warnings = freeze(manifest, points)
        take_snapshot(manifest)
        (folder / "jobs").mkdir(exist_ok=True)
        manifest.write()
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return manifest, warnings


def freeze(manifest: Manifest, points: Sequence[Point]) -> list[str]:
    """Composes and checks every point, then adds the trials to the manifest with their `config.yaml`; warnings.

    Raises:
        ConfigError: with the problems of all points; nothing is added then.
    """
    configs, warnings = composed(manifest.base, points)
    trials = [_trial(manifest, point, config, n) for n, (point, config) in enumerate(zip(points, configs, strict=True))]
    _refuse_doubles([*manifest.trials, *trials])
    for trial, config in zip(trials, configs, strict=True):
        manifest.directory(trial).mkdir(exist_ok=True)  # of a controller that was killed before it wrote the manifest
        save_config(config, manifest.directory(trial))
    manifest.trials += trials
    return warnings


def composed(base: Sequence[str], points: Sequence[Point]) -> tuple[list[DictConfig], list[str]]:
    """The config of every point, checked, and warnings.

    Raises:
        ConfigError: with the problems of all points.
    """
    configs: list[DictConfig] = []
    problems: list[str] = []
    warnings: list[str] = []
    for point in points:
        try:
            config, said = checked([*base, *point.overrides])
        except ConfigError as error:
            problems += error.problems
        else:
            configs.append(config)
            warnings += said
    if problems:
        raise ConfigError(problems)
    return configs, list(dict.fromkeys(warnings))


def _trial(manifest: Manifest, point: Point, config: DictConfig, position: int) -> Trial:
    print_of_it = fingerprint_of_trial(config)
    number = len(manifest.trials) + position
    return Trial(
        id=f"{number:03}_{print_of_it[:8]}",
        fingerprint=print_of_it,
        settings=point.settings,
        seed=point.seed,
        overrides=[*manifest.base, *point.overrides],
    )


def fingerprint_of_trial(config: DictConfig) -> str:
    """Takes what belongs to the sweep out of `config`."""
    with open_dict(config):
        for key in ("hydra", *NOT_OF_A_TRIAL):
            config.pop(key, None)
    return fingerprint(config)


def _refuse_doubles(trials: Sequence[Trial]) -> None:
    """Two trials with one fingerprint would be the same training twice."""
    seen: dict[str, Trial] = {}
    for trial in trials:
        twin = seen.setdefault(trial.fingerprint, trial)
        if twin is not trial:
            raise ConfigError(
                [
                    f"{show(trial.overrides)} and {show(twin.overrides)} are the same training: "
                    "vary settings that change results, each value once"
                ]
            )
