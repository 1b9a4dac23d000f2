"""The way from a command line to a run: bad input is answered in one sentence each, before anything starts.

Hydra keeps what it does well (`--help`, `--cfg`, `--info`, shell completion, single runs, multiruns); its handling of
errors is replaced, because it shows tracebacks of its own and exits with 1 for a misspelt key.
"""

import argparse
import contextlib
import functools
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, cast

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dino import preemption
from dino.config import CONF, ROOT, compose, raw_settings
from dino.exits import (
    EXIT_BAD_CONFIGURATION,
    EXIT_COLLAPSED,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    leaving_at_once,
)
from dino.frozen import load_frozen
from dino.messages import ConfigError, did_you_mean, report
from dino.overrides import compose_or_explain, options_of, parsed
from dino.presets import fit_presets, leaves
from dino.processes import Processes
from dino.validation import checked

Task = Callable[[DictConfig], None]

failed_points: list[str] = []  # of a multirun in this process, a line each

STOPS_A_SWEEP = (EXIT_INTERRUPTED, EXIT_PREEMPTED)  # after these it does not go on to its next point


def main(task: Task) -> Callable[[], None]:
    """Makes `task` the main function of a script whose arguments are Hydra's.

    The process exits with the code of the `SystemExit` that the task raises, with 1 for any other exception, and with 2
    for bad input, of which nothing is left behind: every point of a multirun is checked before the first starts.
    """

    @functools.wraps(task)
    def start() -> None:
        with leaving_at_once():
            try:
                with answering_bad_values():
                    processes = Processes.from_environment()
                _start(processes)
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)  # before a run has begun, which says more
                raise SystemExit(EXIT_INTERRUPTED) from None

    def _start(processes: Processes) -> None:
        if processes.several:
            # Before torch is imported: its C++ warnings would come once a rank, for what is meant (`over_ranks`).
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            preemption.follow_parent()
        if "--frozen" in sys.argv[1:]:
            _start_frozen(processes)
            return
        _choose_cluster()
        if processes.is_main:
            arguments = _checked_arguments(processes)
        else:
            with contextlib.redirect_stderr(io.StringIO()):  # rank 0 says the same
                arguments = _checked_arguments(processes)
            sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null"]  # rank 0 says which directory it is
        guarded = _guarded(task, is_sweep=arguments.multirun)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=ROOT)(guarded)()
        if failed_points:
            print("\n".join([f"{len(failed_points)} of the points failed:", *failed_points]), file=sys.stderr)
            raise SystemExit(EXIT_FAILED)

    def _start_frozen(processes: Processes) -> None:
        said_once = contextlib.nullcontext() if processes.is_main else contextlib.redirect_stderr(io.StringIO())
        with said_once, answering_bad_values():
            config = load_frozen(sys.argv[1:])
        with _ending_with_exit_codes():
            task(config)

    return start


def run_directory(config: DictConfig) -> Path:
    """Where this run's files go, absolute: `run_dir`, or the point's own directory inside a multirun."""
    if HydraConfig.initialized():
        return Path(HydraConfig.get().runtime.output_dir)
    return Path(config.run_dir).absolute()


@contextlib.contextmanager
def answering_bad_values() -> Iterator[None]:
    """A `ValueError` inside (a wrong value that only data or machine can tell) ends the process as bad input does."""
    try:
        yield
    except ConfigError as error:
        exit_with(error.problems)
    except ValueError as error:
        exit_with([str(error)])


def exit_with(problems: Sequence[str]) -> NoReturn:
    """Prints one line a problem and ends the process as one with a bad configuration."""
    print(report(problems), file=sys.stderr)
    raise SystemExit(EXIT_BAD_CONFIGURATION)


# ---------------------------------------------------------------------- the command line


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    """Hydra's arguments; an unknown option is a problem of ours, since most are settings written with dashes."""
    arguments, unknown = get_args_parser().parse_known_args(words)
    if unknown:
        options = [_unknown_option(word) for word in unknown if word.startswith("-")]
        exit_with(options or [f"{word}: write options such as -m first, then all settings" for word in unknown])
    for option in ("config_name", "config_path", "config_dir"):
        if getattr(arguments, option) is not None:
            exit_with(
                [f"--{option.replace('_', '-')}: configs are read from {CONF}; put your file into one of its groups"]
            )
    return arguments


def _choose_cluster() -> None:
    """`hydra/launcher=slurm` brings `cluster=slurm`, whose settings it reads; no file of Hydra's own groups could."""
    chosen = {name: option for name, equals, option in (word.partition("=") for word in sys.argv[1:]) if equals}
    launcher = chosen.get("hydra/launcher")
    if launcher in options_of("cluster") and "cluster" not in chosen:
        sys.argv.insert(sys.argv.index(f"hydra/launcher={launcher}") + 1, f"cluster={launcher}")


def _checked_arguments(processes: Processes) -> argparse.Namespace:
    arguments = _arguments(sys.argv[1:])
    if processes.several and arguments.multirun:
        exit_with([f"-m with {processes.world_size} processes: start each point by itself, or use one process"])
    if not _only_shows(arguments):
        _refuse_bad_input(arguments)
    elif arguments.overrides and (arguments.cfg or arguments.help or arguments.info) and not arguments.multirun:
        _, problems = compose_or_explain(arguments.overrides)  # a config that lacks a path may be looked at
        if problems:
            exit_with(problems)
    return arguments


def _unknown_option(word: str) -> str:
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    keys = [key for key in _all_keys() if key.split(".")[-1] == name]
    hint = f", such as {keys[0]}=VALUE" if keys else did_you_mean(name, _all_keys())
    return f"{word}: no such option; settings are written key=value without dashes{hint}"


def _all_keys() -> list[str]:
    return list(leaves(raw_settings(compose([]))))


def _only_shows(arguments: argparse.Namespace) -> bool:
    shows = (arguments.help, arguments.hydra_help, arguments.cfg, arguments.info, arguments.shell_completion)
    return any(shows) or arguments.experimental_rerun is not None


def _refuse_bad_input(arguments: argparse.Namespace) -> None:
    try:
        points = _points(arguments.overrides) if arguments.multirun else [arguments.overrides]
        warnings = check_points(points)
    except ConfigError as error:
        exit_with(error.problems)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _points(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every point of the grid that Hydra's own sweeper makes."""
    if any(line.lstrip("+").startswith("run_dir=") for line in overrides):
        raise ConfigError(["run_dir with -m: every point needs a directory of its own; set hydra.sweep.dir instead"])
    readable, problems = parsed(overrides)
    if problems:
        raise ConfigError(problems)
    hydra_overrides = [override.input_line or "" for override in readable if override.is_hydra_override()]
    if any(line.startswith("hydra/sweeper=") for line in hydra_overrides):
        # Another sweeper chooses its points while it runs; what does not vary can still be checked.
        return [[o.input_line or "" for o in readable if not o.is_sweep_override()]]
    own = [override for override in readable if not override.is_hydra_override()]
    (batch,) = BasicSweeper.split_arguments(own, max_batch_size=None)
    return [[*hydra_overrides, *point] for point in batch]


def check_points(points: Sequence[Sequence[str]]) -> list[str]:
    """Checks every point; returns the warnings.

    Raises:
        ConfigError: with the problems of all points, each once.
    """
    problems: list[str] = []
    warnings: list[str] = []
    for point in points:
        try:
            warnings += checked(point)[1]
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return list(dict.fromkeys(warnings))


# ---------------------------------------------------------------------- the task


def _guarded(task: Task, *, is_sweep: bool) -> Task:
    """`task` with exceptions turned into exit codes; in a sweep, a point that fails does not stop the others."""
    main_process = os.getpid()

    @functools.wraps(task)
    def run(config: DictConfig) -> None:
        try:
            _run_or_exit(task, config)
        except SystemExit as stop:
            if not is_sweep or not stop.code or stop.code in STOPS_A_SWEEP or os.getpid() != main_process:
                raise
            failed_points.append(f"  exit code {stop.code}: {run_directory(config)}")

    return run


def _run_or_exit(task: Task, config: DictConfig) -> None:
    with _ending_with_exit_codes():
        fit_presets(config, CONF, cast(DictConfig, HydraConfig.get()))
        task(config)


@contextlib.contextmanager
def _ending_with_exit_codes() -> Iterator[None]:
    try:
        with answering_bad_values():
            yield
    except SystemExit as stop:
        _leave_others_behind(stop.code)
        raise
    except Exception:
        # This is for what happens before the run has a log of its own; from there on it writes the traceback itself.
        traceback.print_exc()
        _leave_others_behind(EXIT_FAILED)
        raise SystemExit(EXIT_FAILED) from None


def _leave_others_behind(code: str | int | None) -> None:
    """A rank that fails must be gone at once, since the others wait for it; an orderly exit could wait for them."""
    together = (0, EXIT_PREEMPTED, EXIT_COLLAPSED)
    if Processes.from_environment().several and isinstance(code, int) and code not in together:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
