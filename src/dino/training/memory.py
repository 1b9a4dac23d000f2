"""What to do when memory runs out."""

import contextlib
from collections.abc import Iterator

import torch

from dino.training.options import TrainerOptions


class OutOfMemoryError(RuntimeError):
    """The memory of the device or of the process did not suffice."""


@contextlib.contextmanager
def advice_when_out_of_memory(options: TrainerOptions, batch_size: int) -> Iterator[None]:
    """Turns any sign of memory having run out into an error that says what to turn down."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(_advice(error, options, batch_size)) from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise RuntimeError(_of_a_worker(error)) from error
        if "can't allocate memory" not in str(error):  # how torch's CPU allocator puts it
            raise
        raise OutOfMemoryError(_advice(error, options, batch_size)) from error


def _of_a_worker(error: RuntimeError) -> str:
    return (
        f"{str(error).splitlines()[0]} If the system killed it, memory was short: turn down dataset.num_workers or "
        "dataset.batch_size; the same command goes on from the newest checkpoint"
    )


def _advice(error: BaseException, options: TrainerOptions, batch_size: int) -> str:
    cause = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"out of memory: {cause} Turn down dataset.batch_size={batch_size} (with trainer.accumulate_steps="
        f"{2 * options.accumulate_steps} half of it is the same large batch; `dino tune batch` finds what fits), "
        "augmentation.num_local_views, head.out_dim or the backbone; trainer.memory=low takes less, more slowly, and "
        "trainer.precision=bf16 less than fp32"
    )
