"""What the command line of `run.py` settles for every benchmark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.harness import Sampling

# One thread, as the threads of tiny steps wait for each other for longer than they work.
QUICK = Sampling(rounds=2, seconds=0.02, warmup=1, max_threads=1)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long and on what to measure.

    Args:
        quick: tiny sizes and two rounds: whether everything runs, not how fast it is.
        rounds: of every comparison; None: as each benchmark has it, fewer where they take long.
        device: auto, cpu or cuda.
        images: folder of photographs for the views; None: made up.
        data: folder that holds Fashion-MNIST.
        epochs: of the training that is timed up to an accuracy.
        seeds: of that training, one run each: of initial weights, order and views.
    """

    quick: bool = False
    rounds: int | None = None
    device: str = "auto"
    images: Path | None = None
    data: Path = Path("data")
    epochs: int = 4
    seeds: Sequence[int] = (0,)

    def sampling(self, *, rounds: int = 7, seconds: float = 1.0, device: str | None = None) -> Sampling:
        """Of a comparison that wants `rounds` samples of about `seconds`."""
        device = self.device if device is None else device
        if self.quick:
            return replace(QUICK, device=device)
        if self.rounds is not None:
            return Sampling(self.rounds, math.inf, seconds, device=device)
        return Sampling(rounds, seconds=seconds, device=device)
