"""How the loaders run worker processes: one worker makes one whole batch, and decides nothing."""

import atexit
import contextlib
import multiprocessing.util  # its exit hook is registered first, so that it runs after ours
import signal
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from dino import preemption

PREFETCHED_BATCHES = 2  # of each worker, ahead of the training step

Item = TypeVar("Item")

_running: "weakref.WeakSet[Generator[object, None, None]]" = weakref.WeakSet()


class BatchReader(Dataset[Item], Generic[Item], ABC):
    """Makes a whole batch from its sample indices."""

    @abstractmethod
    def __getitem__(self, indices: NDArray[np.int64]) -> Item: ...


def iterate(
    reader: BatchReader[Item], batches: Sequence[NDArray[np.int64]], *, num_workers: int, pin_memory: bool = False
) -> Iterator[Item]:
    """Gives `reader[batch]` for every batch, in order, made by `num_workers` processes (0: here).

    The global random streams are neither read nor advanced. Workers use one thread (torch's DataLoader sees to that).
    They ignore the signals that end or preempt a run, which a scheduler sends to every process of a job: the main
    process ends them, and they end by themselves when it is gone.
    """
    # How many workers pay is measured, not a question of the number of cores alone.
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator().manual_seed(0),  # otherwise the DataLoader draws from the global stream
        prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
    )
    with _signals_held():
        items = _drain(iter(loader))
    _running.add(items)
    return items


def _drain(iterator: Iterator[Item]) -> Generator[Item, None, None]:
    yield from iterator


def _as_it_is(item: Item) -> Item:
    return item


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals that come wait until the end, for this thread and for processes that it starts.

    A worker would die of a SIGTERM between the handlers that the DataLoader sets in it and `_ignore_signals`.
    """
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, preemption.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _ignore_signals(_worker: int) -> None:
    for number in preemption.SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # also forgets those that wait
    signal.pthread_sigmask(signal.SIG_UNBLOCK, preemption.SIGNALS)


@atexit.register
def _stop_workers() -> None:
    """Ends workers that live at exit. Python would send them SIGTERM, which they ignore, and wait for ever.

    Loaders that are still referred to stop theirs in order. What is left, after an error in the midst of a batch whose
    traceback still refers to the loader, is killed.
    """
    for items in list(_running):
        with contextlib.suppress(ValueError):  # the generator is running, in a thread
            items.close()
    left = [child for child in multiprocessing.active_children() if child.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader's would raise an error for each
        for child in left:
            child.kill()
