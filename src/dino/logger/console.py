"""The terminal: a live progress line, or plain lines where there is no terminal."""

import time

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dino.logger.base import Logger, RunContext
from dino.messages import clock_time
from dino.run import go_on_without_stdout

SHOWN = {  # metric -> label and format on the progress line
    "train/loss": ("loss", "{:.3f}"),
    "train/lr": ("lr", "{:.2e}"),
    "perf/images_per_s": ("images/s", "{:.1f}"),
    "val/knn_top1": ("k-NN", "{:.1f} %"),
}
UNIFORM_LOSS = "train/loss_uniform"  # ln K, what a student that has learned nothing gets


class Console(Logger):
    """Shows step, loss beside ln K, learning rate, images/s, time left and the last k-NN.

    Args:
        plain_every_s: without a terminal, at most one line in so many seconds (evaluations are always shown).
    """

    def __init__(self, plain_every_s: float = 10.0) -> None:
        if plain_every_s < 0:
            raise ValueError(f"logger.console.plain_every_s={plain_every_s}: use 0 or more seconds")
        self.plain_every_s = plain_every_s
        self._shown: dict[str, str] = {}
        self._progress: Progress | None = None
        self._last_line = float("-inf")
        self._waiting: str | None = None  # a line that is not printed yet
        self._pace_from: tuple[float, int] | None = None  # time and step of the first line of this start

    def start(self, context: RunContext) -> None:
        self._context = context
        if not RichConsole().is_terminal:
            return
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("", total=context.total_steps, completed=context.first_step)
        self._progress.start()

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        new = {label: form.format(metrics[name]) for name, (label, form) in SHOWN.items() if name in metrics}
        if "loss" in new and UNIFORM_LOSS in metrics:
            new["loss"] += f" of ln K {metrics[UNIFORM_LOSS]:.3f}"
        self._shown |= new
        text = "  ".join(f"{label} {value}" for label, value in self._shown.items())
        if self._progress is not None:
            self._progress.update(self._task, description=text)
        else:
            self._waiting = f"step {step}/{self._context.total_steps}  {text}  left {self._time_left(step)}"
            if "k-NN" in new or self._is_due():
                self._print_waiting()

    def close(self) -> None:
        self._print_waiting()
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print_waiting(self) -> None:
        if self._waiting is not None:
            try:
                print(self._waiting, flush=True)
            except OSError:
                go_on_without_stdout()
        self._waiting = None

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now - self._last_line < self.plain_every_s:
            return False
        self._last_line = now
        return True

    def _time_left(self, step: int) -> str:
        """At the pace since the first line: what comes before it, the first step above all, takes longer."""
        now = time.monotonic()
        if self._pace_from is None and step > self._context.first_step:
            self._pace_from = now, step
        if self._pace_from is None or step == self._pace_from[1]:
            return "-"
        started, first = self._pace_from
        return clock_time((now - started) / (step - first) * (self._context.total_steps - step))
