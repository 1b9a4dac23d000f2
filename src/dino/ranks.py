"""What the processes of a data-parallel run tell each other; a single process never touches torch.distributed.

Every function is collective: all ranks call it, in the same order. Tensors on the training device go over NCCL or gloo;
flags and Python objects go over a gloo group of their own, so that no GPU is waited for.

Shapes: N rows of this rank.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dino.exits import EXIT_COLLAPSED, EXIT_PREEMPTED
from dino.processes import Processes

log = logging.getLogger("dino")

TIMEOUT = timedelta(minutes=30)  # for the slowest rank to arrive; a rank that died is noticed at once

Value = TypeVar("Value")

_control: Any = None  # the gloo group for flags and objects
_alone = False


@contextlib.contextmanager
def process_group(processes: Processes, device: torch.device) -> Iterator[None]:
    """Joins the ranks of a run; does nothing for a single process.

    After an exception the group is left as it is: the others notice that this process has gone, while taking the group
    apart could wait for them for ever.

    Raises:
        ValueError: rank 0 cannot listen on MASTER_PORT.
    """
    global _control
    if not processes.several:
        yield
        return
    if processes.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _check_port(int(os.environ["MASTER_PORT"]))
    backend = "nccl" if device.type == "cuda" else "gloo"
    rank, world_size = processes.rank, processes.world_size
    dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world_size, timeout=TIMEOUT)
    _control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    together = False
    try:
        yield
        together = True
    except SystemExit as stop:
        together = stop.code in (EXIT_PREEMPTED, EXIT_COLLAPSED)  # all ranks leave at the same step
        raise
    finally:
        if together:
            wait_for_all()  # some launchers end all tasks when the first one has ended
            _control = None
            dist.destroy_process_group()


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(f"MASTER_PORT={port} cannot be listened on ({error.strerror}): set another one") from None


def is_distributed() -> bool:
    return not _alone and dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def own_part(count: int, unit: int = 1) -> slice:
    """This rank's contiguous part of `count` things, in whole chunks of `unit`; empty where there are too few.

    One after another the parts of all ranks are the whole. With the unit in which the things are computed, every rank
    computes exactly the chunks that a single process would.
    """
    num_chunks = -(-count // unit)
    first, last = (num_chunks * number // world_size() * unit for number in (rank(), rank() + 1))
    return slice(first, min(last, count))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank computes as if it were the only one: sums and maxima are its own."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


# ---------------------------------------------------------------------- tensors


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sums in place over all ranks."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def sum_over_ranks_meanwhile(tensor: Tensor) -> Callable[[], Tensor]:
    """Begins to sum in place over all ranks; what is returned waits for the sum and gives it."""
    if not is_distributed():
        return lambda: tensor
    work = dist.all_reduce(tensor, op=dist.ReduceOp.SUM, async_op=True)

    def arrived() -> Tensor:
        work.wait()
        return tensor

    return arrived


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Elementwise maximum, in place, over all ranks."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather_rows(tensor: Tensor) -> Tensor:
    """CPU tensors [N, ...] to all of them one after another, in the order of the ranks; N may differ from rank to rank.

    A rank without rows gives a tensor [0] of the same type: it need not know the shape of a row.
    """
    if not is_distributed():
        return tensor
    shapes = gather_objects(tensor.shape)
    lengths = [shape[0] for shape in shapes]
    longest = max(shapes, key=lambda shape: shape[0])
    padded = tensor.new_zeros(longest)
    if len(tensor):
        padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=_control)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


class _AllRows(torch.autograd.Function):
    """A rank's loss may depend on the rows of every other, so its gradients go back to them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.contiguous()).chunk(world_size())[rank()]


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """[N, ...], N the same on each rank, to those of all ranks in their order; gradients flow back to where they came
    from. They are those of the sum of the ranks' losses."""
    if not is_distributed():
        return rows
    gathered: Tensor = _AllRows.apply(rows)
    return gathered


# ---------------------------------------------------------------------- flags and objects


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank."""
    if not is_distributed():
        return flag
    shared = torch.tensor(int(flag))
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=_control)
    return bool(shared)


def wait_for_all() -> None:
    """Returns when every rank has come here."""
    if is_distributed():
        dist.barrier(group=_control)


def gather_objects(value: Value) -> list[Value]:
    """The value of every rank, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Value | None] = [None] * world_size()
    dist.all_gather_object(values, value, group=_control)
    return values  # type: ignore[return-value]  # every place is filled


def from_main(value: Value) -> Value:
    """The value of rank 0, on every rank."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_control)
    return values[0]
