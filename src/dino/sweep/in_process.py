"""Trials one after another in the process that submits them, so that breakpoints and debuggers work."""

import contextlib
import runpy
import sys
from collections.abc import Mapping, Sequence

from dino.code import REPOSITORY
from dino.exits import EXIT_INTERRUPTED, EXIT_PREEMPTED
from dino.sweep.cluster import Cluster, Live
from dino.sweep.job import Supervisor, frozen_command
from dino.sweep.local import add_submission
from dino.sweep.manifest import Manifest, Trial
from dino.sweep.pool import is_alive
from dino.sweep.training_process import Ended, Signals


class InProcessCluster(Cluster):
    """Runs frozen configs with the code as it is here, not with its copy; blocks until the last trial has ended."""

    def check(self) -> None:
        """Any machine will do."""

    def submit(self, manifest: Manifest, trials: Sequence[Trial], snapshot: int) -> None:
        """Also returns after Ctrl-C, with what was not begun left for `resume`."""
        submission = add_submission(manifest, trials, snapshot)
        for trial in trials:
            print(f"{trial.id}: {' '.join(trial.overrides)}", flush=True)
            code = InProcessSupervisor(manifest, trial, submission, Signals()).run()
            if code in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
                return

    def live(self, manifest: Manifest) -> Mapping[str, Live]:
        alive = [trial.id for trial in manifest.trials if is_alive(manifest.directory(trial))]
        return {trial_id: Live(state="running") for trial_id in alive}

    def cancel(self, manifest: Manifest, trials: Sequence[Trial]) -> None:
        """Nothing runs beside the command that submits."""

    def scripts(self, manifest: Manifest, trials: Sequence[Trial]) -> list[str]:
        return [f"python train.py --frozen {manifest.directory(trial) / 'config.yaml'}" for trial in trials]


class InProcessSupervisor(Supervisor):
    """Writes down the same; the training process is this one."""

    def _attempt(self) -> tuple[int, bool]:
        self._record_start()
        code = EXIT_PREEMPTED if self.signals.received else self._train()
        preempted = code == EXIT_PREEMPTED
        ended = Ended(code, None, preempted, out_of_memory=False, too_slow=False)
        if code == 0:
            self._record(ended)
            return 0, False
        if preempted:
            return self._after_preemption(ended), False
        return self._after_failure(ended)

    def _train(self) -> int:
        """`python train.py --frozen config.yaml`; its exit code."""
        arguments = sys.argv
        sys.argv = frozen_command(REPOSITORY, self.directory)
        try:
            with contextlib.chdir(self.manifest.cwd):
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.argv = arguments
        return 0
