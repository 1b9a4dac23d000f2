"""Views on their way to a GPU while it is busy with the step before."""

from collections.abc import Iterator

import torch

from dino.augmentation import ViewBatch


def prefetched(windows: Iterator[list[ViewBatch]], device: torch.device) -> Iterator[list[ViewBatch]]:
    """The windows as they are; on a GPU each is made one step ahead, on a stream of its own.

    `windows` sends views to the device and colours them there when it is asked for the next window. The step before
    has been queued by then, so copies from page-locked memory and photometric operations run beside it.
    """
    if device.type != "cuda":
        yield from windows
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def make() -> list[ViewBatch] | None:
        with torch.cuda.stream(stream):
            return next(windows, None)

    window = make()
    while window is not None:
        step = torch.cuda.current_stream(device)
        step.wait_stream(stream)
        for batch in window:
            for tensor in batch.tensors():
                tensor.record_stream(step)  # its memory is not given away before the step is done with it
        yield window
        window = make()
