"""`python train.py --frozen CONFIG [key=value ...]`: the run that a `config.yaml` describes; nothing is composed."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dino.config import changes_results, fingerprint, resolve
from dino.messages import ConfigError, did_you_mean
from dino.overrides import parsed
from dino.presets import leaves
from dino.validation import check

FINGERPRINT = "fingerprint"


def load_frozen(words: Sequence[str]) -> DictConfig:
    """The config of a command line with `--frozen`; only settings that leave results alone may differ from the file.

    Raises:
        ConfigError: for a file that is not there, is no run's `config.yaml`, or was changed since it was written.
    """
    at = words.index("--frozen")
    if at + 1 == len(words):
        raise ConfigError(["--frozen: the path of a run's config.yaml is needed"])
    path, others = Path(words[at + 1]), [*words[:at], *words[at + 2 :]]
    try:
        config = read_frozen(path)
    except ConfigError as error:
        raise ConfigError([f"--frozen {problem}" for problem in error.problems]) from None
    _override(config, others)
    findings = check(config)
    if findings.problems:
        raise ConfigError([f"{path}: {problem}" for problem in findings.problems])
    return config


def read_frozen(path: Path) -> DictConfig:
    """The config in a run's `config.yaml`, without its fingerprint, which must be that of the settings."""
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError([f"{path}: there is no such file; give the config.yaml of a run"]) from None
    except Exception as error:  # YAML's errors and OmegaConf's have no common base
        raise ConfigError([f"{path}: {str(error).splitlines()[0]}"]) from None
    if not isinstance(config, DictConfig) or FINGERPRINT not in config:
        raise ConfigError([f"{path}: this is not the config.yaml of a run (it has no fingerprint)"])
    expected = config.pop(FINGERPRINT)
    actual = fingerprint(config)
    if actual != expected:
        raise ConfigError([f"{path}: its settings give the fingerprint {actual}, not {expected}: the file was changed"])
    return config


def _override(config: DictConfig, words: Sequence[str]) -> None:
    overrides, problems = parsed(words)
    known = leaves(resolve(config))
    for override in overrides:
        key, line = override.key_or_group, override.input_line
        if override.is_sweep_override() or override.is_delete():
            problems.append(f"{line}: with --frozen write key=value")
        elif key not in known:
            problems.append(f"{line}: there is no such key in the frozen config{did_you_mean(key, known)}")
        elif changes_results(key):
            problems.append(f"{line}: changes results, and a frozen config does not; leave out --frozen to change it")
        else:
            OmegaConf.update(config, key, override.value())
    if problems:
        raise ConfigError(problems)
