"""The asynchronous search: as soon as a trial ends, the next point is proposed, frozen and handed over."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino.messages import ConfigError
from dino.sweep.cluster import Cluster, Live
from dino.sweep.freeze import fingerprint_of_trial, freeze
from dino.sweep.manifest import Manifest, Trial
from dino.sweep.plan import axes_of, point_of
from dino.sweep.pruning import Pruning
from dino.sweep.states import (
    BROKEN,
    FINISHED,
    KILLED,
    PENDING,
    PREEMPTED,
    PRUNED,
    RUNNING,
    TIMED_OUT,
    TrialState,
    trial_states,
)
from dino.validation import checked

if TYPE_CHECKING:
    from dino.sweep.study import Study

UNFINISHED = (PENDING, PREEMPTED, KILLED, TIMED_OUT)  # what is handed over again when a search is resumed


def open_study(folder: Path, sweep: Mapping[str, Any]) -> "Study":
    """The study in this folder, of these settings of conf/sweep; made if it is not there.

    Raises:
        ValueError: optuna is not installed, or an axis cannot be searched.
    """
    try:
        from dino.sweep.space import space_of
        from dino.sweep.study import Study
    except ImportError as error:
        raise ValueError(f"sweep.search=optuna: {error}; pip install optuna") from None
    return Study(
        folder,
        space_of(axes_of(sweep["axes"])),
        direction=sweep["direction"],
        seed=sweep["search_seed"],
        pruning=pruning_of(sweep),
    )


def pruning_of(sweep: Mapping[str, Any]) -> Pruning:
    return Pruning(**(sweep.get("pruning") or {}))


class Search:
    """Keeps `limit` trials under way until `sweep.num_trials` points have been tried.

    A trial that fails tells the study so and ends nothing. What was begun and not told when a controller was killed is
    taken up again: a proposal is frozen to the same trial each time, and a trial that runs or has ended is not handed
    over again.

    Args:
        snapshot: of the code that composes the points, and that their trials run.
        limit: so many trials at once.
        patience_s: a trial that is gone without a word is given up after so long, for file systems that are slow to
            show what was written elsewhere.
    """

    def __init__(self, manifest: Manifest, cluster: Cluster, snapshot: int, limit: int, patience_s: float) -> None:
        self.cluster = cluster
        self.snapshot = snapshot
        self.limit = limit
        self.patience_s = patience_s
        self.settings = manifest.sweep
        self.pruning = pruning_of(manifest.sweep)
        self.study = open_study(manifest.folder, manifest.sweep)
        self._asked = self.study.under_way()  # not handed over, as far as is known
        self._watched: dict[int, Trial] = {}
        self._shared: set[int] = set()  # proposals among these whose trial another one has begun
        self._known = {tuple(trial.overrides): trial for trial in manifest.trials}
        self._silent_since: dict[int, float] = {}
        self._stopped = False
        self._said = ""

    def step(self, manifest: Manifest) -> bool:
        """Does what can be done now; False once nothing is left."""
        live = self.cluster.live(manifest)
        if live is None:
            return True
        self._look_after(manifest, live)
        while self._asked or self._may_ask():
            if not self._asked:
                self._asked.append(self.study.ask())
            if not self._hand_over(manifest, self._asked[0]):
                break
            self._asked.pop(0)
        return bool(self._asked or self._watched)

    def _may_ask(self) -> bool:
        return not (
            self._stopped
            or len(self._watched) - len(self._shared) >= self.limit
            or self.study.num_distinct() >= self.settings["num_trials"]
            or self.study.exhausted
        )

    def _hand_over(self, manifest: Manifest, number: int) -> bool:
        """Freezes a proposal and submits its trial, if nobody has; False if another command holds the sweep."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(manifest.locked())
            except ValueError:
                return False
            try:
                trial = self._frozen(manifest, number)
            except ConfigError as error:
                self.study.fail(number, str(error))
                return True
            if not self.study.attach(number, trial.id):
                self._shared.add(number)
            else:
                state = trial_states(manifest, self.cluster)[trial.id]
                if state.held is None:
                    return False  # the cluster cannot be asked now
                if state.state in UNFINISHED and not state.held:
                    try:
                        self.cluster.submit(manifest, [trial], self.snapshot)
                    except ValueError as error:  # refused, or no answer: it may be taken later
                        self._say_once(str(error))
                        return False
        self._watched[number] = trial
        return True

    def _say_once(self, text: str) -> None:
        if text != self._said:
            print(text, flush=True)
        self._said = text

    def _frozen(self, manifest: Manifest, number: int) -> Trial:
        """The trial of a proposal, which may be there already. Raises `ConfigError` for a point that cannot be."""
        point = point_of(self.study.assignments(number), self.settings["seeds"][0])
        overrides = (*manifest.base, *point.overrides)
        if overrides not in self._known:
            try:
                freeze(manifest, [point])
                self._known[overrides] = manifest.trials[-1]
            except ConfigError:
                twin = _twin(manifest, overrides)
                if twin is None:
                    raise
                self._known[overrides] = twin
        return self._known[overrides]

    # ------------------------------------------------------------------ trials under way

    def _look_after(self, manifest: Manifest, live: Mapping[str, Live]) -> None:
        for number in sorted(self._watched.keys() - self._shared):
            reason = self._reason_to_prune(manifest, number)  # also tells the study what those that are gone measured
            trial = self._watched[number]
            if reason is not None and trial.id in live:
                if manifest.cancelled(trial) is None:
                    manifest.mark_cancelled([trial], reason)
                self.cluster.cancel(manifest, [trial])
        gone = [number for number, trial in self._watched.items() if trial.id not in live]
        states = trial_states(manifest, self.cluster) if gone else {}
        for number in gone:
            if self._tell(number, states[self._watched[number].id]):
                del self._watched[number]
                self._shared.discard(number)

    def _tell(self, number: int, state: TrialState) -> bool:
        """Tells the study how a trial ended; False if it has not."""
        if state.held or state.state in (PENDING, RUNNING):
            return False
        if state.state == KILLED and self._is_news(number):
            return False
        if state.state == FINISHED:
            self.study.tell(number, state.metrics.get(self.settings["metric"], float("nan")))
        elif state.state == PRUNED:
            self.study.prune(number)
        elif state.state != PREEMPTED:  # that one goes on when the sweep is resumed
            self.study.fail(number, f"{state.state}: {state.reason}")
        self._stopped |= state.state in BROKEN and self.settings["on_failure"] == "stop"
        return True

    def _is_news(self, number: int) -> bool:
        since = self._silent_since.setdefault(number, time.monotonic())
        return time.monotonic() - since < self.patience_s

    def _reason_to_prune(self, manifest: Manifest, number: int) -> str | None:
        """Tells the study what a trial has measured since the last time; a sentence if the trial is to end now."""
        if self.pruning.pruner is None:
            return None
        metric = self.pruning.metric or self.settings["metric"]
        reason = None
        for epoch, value in measured(manifest.directory(self._watched[number]) / "metrics.jsonl", metric):
            if self.study.report(number, epoch, value) and reason is None:
                reason = f"{PRUNED} at epoch {epoch}: {metric}={value:.4g} (sweep.pruning.pruner={self.pruning.pruner})"
        return reason


def _twin(manifest: Manifest, overrides: Sequence[str]) -> Trial | None:
    """The trial that these overrides are another way to write. Raises `ConfigError` for a point that cannot be."""
    same = fingerprint_of_trial(checked(overrides)[0])
    return next((trial for trial in manifest.trials if trial.fingerprint == same), None)


def measured(path: Path, metric: str) -> Iterator[tuple[int, float]]:
    """Epoch and value of each evaluation in a `metrics.jsonl`; values that are not finite are left out."""
    mark = json.dumps(metric)
    try:
        lines = [line for line in path.read_text().splitlines() if mark in line]
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line may be cut off
            content = json.loads(line)
            if content.get(metric) is not None:
                yield int(content["epoch"]), float(content[metric])
