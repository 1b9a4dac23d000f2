"""The study of a search: what Optuna has proposed and been told, kept in `study.log` of the sweep."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from dino.sweep.pruning import Pruning

STUDY = "study.log"
TRIAL, DUPLICATE, REASON = "trial", "duplicate", "reason"  # attributes of a proposal
MAX_DUPLICATES = 50  # proposals in a row that are known already; after these there is nothing new to be found


class Study:
    """Proposals by number, each attached to the trial that tries it. One process at a time may open it.

    A proposal is a function of `seed`, its number, and what the study has been told before, so that a study that goes
    on in another process does not begin again with the first proposals.
    """

    def __init__(
        self, folder: Path, space: Mapping[str, BaseDistribution], *, direction: str, seed: int, pruning: Pruning
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = str(folder / STUDY)
        _drop_cut_line(folder / STUDY)
        self._space = dict(space)
        self._seed = seed
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(path, _NoLock(path))),
            study_name="sweep",
            direction=StudyDirection[direction.upper()],
            pruner=_pruner(pruning),
            load_if_exists=True,
        )

    def ask(self) -> int:
        """The number of a new proposal."""
        (seed,) = np.random.SeedSequence([self._seed, len(self._proposals())]).generate_state(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Trials that run count as bad ones, so that several proposals at once differ.
            self._study.sampler = TPESampler(seed=int(seed), constant_liar=True)
        return self._study.ask(self._space).number

    def assignments(self, number: int) -> list[str]:
        """`key=value` of a proposal."""
        return [f"{key}={value}" for key, value in self._proposals()[number].params.items()]

    def under_way(self) -> list[int]:
        """The proposals that have not been told how they ended."""
        return [proposal.number for proposal in self._proposals() if proposal.state == TrialState.RUNNING]

    def num_distinct(self) -> int:
        """How many proposals there are, without those that another had made before."""
        return sum(DUPLICATE not in proposal.user_attrs for proposal in self._proposals())

    @property
    def exhausted(self) -> bool:
        """Whether for long every proposal had been made before."""
        newest = self._proposals()[-MAX_DUPLICATES:]
        return len(newest) == MAX_DUPLICATES and all(DUPLICATE in proposal.user_attrs for proposal in newest)

    def attach(self, number: int, trial_id: str) -> bool:
        """Notes which trial tries a proposal; False if another proposal has made it already, and this one shares it."""
        others = [other for other in self._proposals() if other.user_attrs.get(TRIAL) == trial_id]
        is_first = all(DUPLICATE in other.user_attrs or other.number == number for other in others)
        if not is_first:
            self._trial(number).set_user_attr(DUPLICATE, True)
        self._trial(number).set_user_attr(TRIAL, trial_id)
        return is_first

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Adds a value on the way, each epoch's once; whether the trial is to be ended now."""
        if epoch in self._proposals()[number].intermediate_values:
            return False
        trial = self._trial(number)
        trial.report(value, epoch)
        return trial.should_prune()

    def tell(self, number: int, value: float) -> None:
        """The proposal's value; one that is not finite is a failure."""
        if math.isfinite(value):
            self._study.tell(number, value)
        else:
            self.fail(number, f"its value is {value}")

    def prune(self, number: int) -> None:
        self._study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """Nothing is learned from it, and the study goes on."""
        self._trial(number).set_user_attr(REASON, reason)
        self._study.tell(number, state=TrialState.FAIL)

    def _proposals(self) -> Sequence[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _trial(self, number: int) -> optuna.Trial:
        """As `ask` gave it, in whichever process that was."""
        return optuna.Trial(self._study, self._proposals()[number]._trial_id)


def _drop_cut_line(path: Path) -> None:
    """What a full disk or a killed controller has left of a line would make the next one unreadable."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def _pruner(pruning: Pruning) -> BasePruner:
    if pruning.pruner == "median":
        return MedianPruner(n_startup_trials=pruning.startup_trials, n_warmup_steps=pruning.warmup_epochs)
    if pruning.pruner == "asha":
        return SuccessiveHalvingPruner(min_resource=max(1, pruning.warmup_epochs))
    return NopPruner()


class _NoLock(JournalFileOpenLock):
    """The controller's lock is enough; a lock file would stay behind one that was killed."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass
