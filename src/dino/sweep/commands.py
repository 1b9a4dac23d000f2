"""What the commands of sweep.py do: they read the manifest and the files of the trials, whoever submitted them."""

import contextlib
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.live import Live as LiveDisplay

from dino.exits import EXIT_FAILED, EXIT_PREEMPTED
from dino.sweep import background
from dino.sweep.cluster import Cluster
from dino.sweep.clusters import cluster_of
from dino.sweep.collect import collect as collected
from dino.sweep.freeze import SEARCH, plan
from dino.sweep.manifest import MANIFEST, Manifest, Trial
from dino.sweep.report import terminal_report, write
from dino.sweep.snapshot import take_snapshot
from dino.sweep.states import (
    COLLAPSED,
    FAILED,
    FINISHED,
    NOT_A_NUMBER,
    PRUNED,
    UNDER_WAY,
    TrialState,
    trial_states,
)
from dino.sweep.status_table import status_table


class Code(StrEnum):
    """Which code `resume` runs."""

    AUTO = "auto"
    SUBMITTED = "submitted"
    CURRENT = "current"


console = Console()


def find(sweep: Path | None) -> Manifest:
    """The sweep in this folder; without one the newest below outputs/sweeps, of those that were more than a dry run.

    Raises:
        ValueError: there is none.
    """
    if sweep is not None:
        return Manifest.read(sweep)
    found: list[Manifest] = []
    for path in Path("outputs/sweeps").glob(f"*/{MANIFEST}"):
        with contextlib.suppress(ValueError):  # one that is damaged hides no other
            found.append(Manifest.read(path.parent))
    if not found:
        raise ValueError("outputs/sweeps: no sweep is here; name the folder of one, or submit one")
    return max(found, key=lambda manifest: (bool(manifest.submissions) or _searches(manifest), manifest.created))


def chosen(manifest: Manifest, names: Sequence[str]) -> list[Trial]:
    """The trials of these ids or numbers; all of them where none is named."""
    by_number = {str(int(trial.id.split("_")[0])): trial for trial in manifest.trials}
    named = [by_number.get(name.lstrip("0") or "0") or manifest.trial(name) for name in names]
    return [trial for trial in manifest.trials if trial in named] or manifest.trials


def submit(words: Sequence[str], *, dry_run: bool) -> None:
    """Plans, checks and freezes all trials, then hands them to the cluster and returns."""
    manifest, warnings = plan(words)
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    cluster = cluster_of(manifest)
    if dry_run:
        for script in cluster.scripts(manifest, manifest.trials):
            print(script)
        _say(
            f"{len(manifest.trials)} trials are frozen and nothing is submitted; sweep.py resume {manifest.folder} does"
        )
        return
    with manifest.locked():
        if _searches(manifest):
            background.ensure_running(manifest)
        else:
            cluster.submit(manifest, manifest.trials, snapshot=0)
    num_trials = manifest.sweep["num_trials"] if _searches(manifest) else len(manifest.trials)
    _say(f"submitted   {_count(num_trials)}")
    _say(f"sweep       {_shown(manifest.folder)}")
    for command in ("status", "logs", "cancel", "resume", "collect"):
        _say(f"            python sweep.py {command} {shlex.quote(_shown(manifest.folder))}")


def status(manifest: Manifest, *, watch: bool, every_s: float = 2.0) -> None:
    """Prints the table of all trials; with `watch` again and again, until no trial is under way."""
    cluster = cluster_of(manifest)
    if not watch:
        console.print(status_table(manifest, trial_states(manifest, cluster), console.width))
        return
    with LiveDisplay(console=console, auto_refresh=False) as display:
        while True:
            manifest = Manifest.read(manifest.folder)
            states = trial_states(manifest, cluster)
            display.update(status_table(manifest, states, console.width), refresh=True)
            if not _goes_on(manifest, states):
                return
            time.sleep(every_s)


def cancel(manifest: Manifest, names: Sequence[str]) -> None:
    """Stops trials that wait or run; what they have learned so far stays, and `resume` goes on from there."""
    cluster = cluster_of(manifest)
    with manifest.locked():
        if _searches(manifest) and not names:
            background.stop(manifest)  # or it would begin others
        states = _known_states(manifest, cluster)
        trials = [trial for trial in chosen(manifest, names) if states[trial.id].state in UNDER_WAY]
        manifest.mark_cancelled(trials, "by sweep.py cancel")
        cluster.cancel(manifest, trials)
    _say(f"cancelled   {_count(len(trials))} of {_shown(manifest.folder)}; those that run save and stop")


def resume(manifest: Manifest, names: Sequence[str], code: Code) -> None:
    """Hands over again what is missing, was stopped, or failed; never what is finished or still held by the cluster.

    Trials that failed run the code as it is now, since it is there to mend them; all others go on with the code that
    they were submitted with.
    """
    cluster = cluster_of(manifest)
    cluster.check()
    with manifest.locked():
        states = _known_states(manifest, cluster)
        open_trials = [trial for trial in chosen(manifest, names) if _may_run(states[trial.id])]
        for trial in open_trials:
            config = manifest.directory(trial) / "config.yaml"
            if not config.is_file():
                raise ValueError(f"{config}: the frozen config is gone; name other trials, or submit a new sweep")
            manifest.unmark_cancelled(trial)
        for snapshot, trials in _by_code(manifest, open_trials, states, code):
            cluster.submit(manifest, trials, snapshot)
            folder = manifest.snapshots[snapshot].folder
            _say(f"submitted   {_count(len(trials))} with the code in {folder}: {', '.join(t.id for t in trials)}")
        if _searches(manifest):
            background.ensure_running(manifest)
    held = sum(bool(state.held) for state in states.values())
    finished = sum(state.state == FINISHED for state in states.values())
    _say(f"left alone  {finished} finished, {held} under way")
    stopping = [trial.id for trial in manifest.trials if states[trial.id].held and manifest.cancelled(trial)]
    if stopping:
        _say(f"stopping    {', '.join(stopping)}; resume again when they have")


def _known_states(manifest: Manifest, cluster: Cluster) -> dict[str, TrialState]:
    """Raises `ValueError` where nobody can say what runs."""
    states = trial_states(manifest, cluster)
    if any(state.held is None for state in states.values()):
        raise ValueError(
            f"{manifest.folder}: whether its trials run cannot be asked from here and now; try where they do"
        )
    return states


def _count(number: int) -> str:
    return f"{number} trial" if number == 1 else f"{number} trials"


def _searches(manifest: Manifest) -> bool:
    """Whether a process behind the sweep chooses its trials, one after another."""
    return bool(manifest.sweep["search"] == SEARCH)


def _goes_on(manifest: Manifest, states: Mapping[str, TrialState]) -> bool:
    """Whether there is something to wait for; where the cluster cannot be asked, what the files say counts."""
    held = any(state.held or (state.held is None and state.state in UNDER_WAY) for state in states.values())
    return held or (_searches(manifest) and background.is_running(manifest))


def _may_run(state: TrialState) -> bool:
    return not state.held and state.state not in (FINISHED, PRUNED, COLLAPSED)


def _by_code(
    manifest: Manifest, trials: Sequence[Trial], states: dict[str, TrialState], code: Code
) -> Iterator[tuple[int, list[Trial]]]:
    """Number of a snapshot, and the trials that are to run it."""
    groups: dict[int, list[Trial]] = {}
    current = cache(lambda: take_snapshot(manifest))  # the same for all of them, or none
    for trial in trials:
        submission = manifest.last_submission(trial)
        mended = states[trial.id].state in (FAILED, NOT_A_NUMBER)
        if code is Code.CURRENT or (code is Code.AUTO and mended):
            snapshot = current()
        else:
            snapshot = submission.snapshot if submission is not None else 0
        groups.setdefault(snapshot, []).append(trial)
    yield from sorted(groups.items())


def logs(manifest: Manifest, names: Sequence[str], *, num_lines: int, follow: bool) -> None:
    """Prints the end of the logs of each trial."""
    for trial in chosen(manifest, names):
        files = log_files(manifest, trial)
        if not files:
            _say(f"{trial.id}: no log yet")
        for path in files:
            _say(f"==> {_shown(path)}")
            print("\n".join(path.read_text(errors="replace").splitlines()[-num_lines:]))
    if follow:
        trials = chosen(manifest, names)
        if len(trials) != 1:
            raise ValueError("--follow: name one trial, such as its number")
        _follow(manifest.directory(trials[0]) / "train.log")


def log_files(manifest: Manifest, trial: Trial) -> list[Path]:
    """`train.log` of a trial; if it has none, or failed before it had one, what its jobs printed."""
    jobs = [item.jobs[trial.id] for item in manifest.submissions if trial.id in item.jobs]
    printed = [path for job in jobs for path in sorted((manifest.folder / "jobs").glob(f"{job}_*log.*"))]
    own = [manifest.directory(trial) / "train.log"]
    for paths in (own, [manifest.folder / "jobs" / f"{trial.id}.log", *printed]):
        if found := [path for path in paths if path.is_file() and path.stat().st_size]:
            return found
    return []


def _follow(path: Path) -> None:
    """Prints what is added to a file, until Ctrl-C."""
    position = path.stat().st_size if path.exists() else 0
    while True:
        if path.exists():
            with path.open(errors="replace") as file:
                file.seek(position)
                print(file.read(), end="", flush=True)
                position = file.tell()
        time.sleep(0.5)


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _shown(path: Path) -> str:
    """Relative to where we are, if it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def collect(manifest: Manifest) -> int:
    """Writes the results as files and prints them; the exit code: 75 it goes on, 0 all finished, 1 some did not."""
    states = trial_states(manifest, cluster_of(manifest))
    results = collected(manifest, states)
    files = write(results)
    console.print(terminal_report(results))
    if results.best_row is not None:
        commit = results.best_row.snapshot.commit if results.best_row.snapshot else "unknown"
        _say(f"The best again (code: {commit}):")
        print(results.best_row.command)
    _say(f"files       {_shown(manifest.folder)}: {', '.join(path.name for path in files)}")
    if _goes_on(manifest, states):
        return EXIT_PREEMPTED
    complete = all(state.state in (FINISHED, PRUNED) for state in states.values())
    return 0 if complete and states else EXIT_FAILED
