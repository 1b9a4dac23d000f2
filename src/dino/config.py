"""The configuration of a run: composing it, resolving it, what of it changes results, and building objects from it.

This is the only place that instantiates; leaves take plain typed arguments and know nothing of Hydra. Importing it
costs Hydra and OmegaConf only, no torch, so that a bad command line is answered at once.
"""

import fnmatch
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from dino.messages import ConfigError, show
from dino.presets import fit_presets, leaves
from dino.targets import Policy, instantiate

CONF = Path(__file__).resolve().parents[2] / "conf"
ROOT = "train"

# Keys of conf/train.yaml that belong to no `_target_`.
TOP_LEVEL_KEYS = ("name", "run_dir", "resume", "resume_changes", "seed", "allowed_targets")

# Keys that leave the numbers of a run as they are; in conf/ each carries "changes results: no" in its comment.
UNRELATED_TO_RESULTS = (
    "name",
    "run_dir",
    "resume",
    "resume_changes",
    "allowed_targets",
    "dataset.root",
    "dataset.download",
    "dataset.num_workers",
    "augmentation.photometric_device",
    "loss.implementation",
    "trainer.device",
    "trainer.memory",
    "trainer.parallel",
    "trainer.max_steps",
    "trainer.limit_evaluation_samples",
    "trainer.num_threads",
    "trainer.save_every_steps",
    "trainer.save_every_epochs",
    "trainer.keep_checkpoints",
    "trainer.keep_every_epochs",
    "trainer.on_save_error",
    "trainer.max_skipped_steps",
    "monitor.*",
    "evaluation.*.every_epochs",
    "evaluation.pictures.*",
    "logger.*",
    "cluster.*",
    "sweep.*",
)

_RUN_ID = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(3)}"


def fit_to_patch(size: int, patch_size: int) -> int:
    """The positive multiple of `patch_size` nearest to `size`, half up [pixels]."""
    return max(1, (2 * int(size) + patch_size) // (2 * patch_size)) * patch_size


def register_resolvers() -> None:
    """`${fit_to_patch:size,patch}` and `${run_id:}` (date, time and a random part, the same for the whole process)."""
    if not OmegaConf.has_resolver("fit_to_patch"):
        OmegaConf.register_new_resolver("fit_to_patch", fit_to_patch)
        # Cached, so that the points of a sweep agree on the sweep's directory in whatever process they run.
        OmegaConf.register_new_resolver("run_id", lambda: _RUN_ID, use_cache=True)


register_resolvers()


def hydra_compose(overrides: Sequence[str]) -> DictConfig:
    """The config with Hydra's own node, or Hydra's exception; `compose` is the one to use elsewhere."""
    with initialize_config_dir(str(CONF), version_base="1.3", job_name=ROOT):
        config = hydra.compose(ROOT, overrides=list(overrides), return_hydra_config=True)
    fit_presets(config, CONF, config.hydra)
    return config


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The config of `python train.py OVERRIDES`, outside of Hydra's main.

    Raises:
        ConfigError: for unknown keys and options and for overrides that cannot be read; values are not checked
            (`dino.validation`).
    """
    from dino.overrides import compose_or_explain  # it needs this module

    config, problems = compose_or_explain(overrides)
    if problems or config is None:
        raise ConfigError(problems)
    with open_dict(config):
        del config["hydra"]
    return config


def resolve(config: DictConfig) -> dict[str, Any]:
    """The whole config as plain dictionaries, lists and values, with no interpolation left."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    settings = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


# ---------------------------------------------------------------------- what changes results


def changes_results(key: str) -> bool:
    return not any(fnmatch.fnmatchcase(key, pattern) for pattern in UNRELATED_TO_RESULTS)


def result_settings(config: DictConfig) -> dict[str, Any]:
    """Dotted key -> value of every setting that changes results."""
    return {key: value for key, value in leaves(resolve(config)).items() if changes_results(key)}


def fingerprint(config: DictConfig) -> str:
    """16 hexadecimal digits that are the same for two configs if all settings that change results are."""
    canonical = json.dumps(result_settings(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each setting in which two `result_settings` differ."""
    absent = object()

    def text(value: Any) -> str:
        return "absent" if value is absent else show(value)

    pairs = {key: (old.get(key, absent), new.get(key, absent)) for key in sorted({*old, *new})}
    return [f"{key}: {text(before)} -> {text(after)}" for key, (before, after) in pairs.items() if before != after]


def save_config(config: DictConfig, run_dir: Path) -> Path:
    """Writes `config.yaml`: the fingerprint first, then everything resolved; `run_dir` is where the run really is."""
    settings = {"fingerprint": fingerprint(config), **resolve(config), "run_dir": str(run_dir)}
    path = run_dir / "config.yaml"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    temporary.replace(path)
    return path


# ---------------------------------------------------------------------- objects


def build(config: DictConfig, key: str, **runtime: Any) -> Any:
    """Builds what the node at `key` describes, with everything nested in it.

    `runtime` arguments are what only the running program knows (`in_dim` of the head); they win over the node's keys.
    With them a `_partial_` node is completed and called; without, it comes back as a `functools.partial`.

    Raises:
        ConfigError: for a target that is not allowed or not there, and for keys that it does not take.
        ValueError: as raised by the target, for a value out of range.
    """
    node = OmegaConf.select(config, key)
    assert isinstance(node, DictConfig), f"{key} is not a group of settings"
    return instantiate(key, OmegaConf.to_container(node, resolve=True), policy(config), runtime)


def policy(config: DictConfig) -> Policy:
    """What this config may build, and which keys need not be parameters because other keys read them."""
    return Policy(tuple(config.get("allowed_targets") or ()), read_keys_of_conf() | frozenset(read_keys(config)))


_REFERENCE = re.compile(r"(?:\$\{|oc\.select:\s*)([A-Za-z_][\w.]*)\s*[},]")


@cache
def read_keys_of_conf() -> frozenset[str]:
    """Every key that some file of conf/ reads. All files count, not only those chosen, so that replacing a reader
    (`loss/centering=sinkhorn`) does not make the key that it read an unknown one."""
    return frozenset(key for path in CONF.rglob("*.yaml") for key in referenced_keys(path.read_text(errors="replace")))


def referenced_keys(text: Any) -> list[str]:
    """The keys that a value reads, as it is written."""
    return _REFERENCE.findall(str(text))


def raw_settings(config: DictConfig) -> dict[str, Any]:
    """The config as plain containers, interpolations as they are written, without Hydra's node."""
    settings = OmegaConf.to_container(config, resolve=False)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items() if key != "hydra"}


def read_keys(config: DictConfig) -> set[str]:
    """Every key that a key of this config reads."""
    raw = leaves(raw_settings(config))
    return {key for value in raw.values() for key in referenced_keys(value)}
