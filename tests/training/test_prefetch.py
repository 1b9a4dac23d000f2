"""Windows come in order, and on a GPU a step ahead without changing what a step sees."""

from collections.abc import Iterator

import pytest
import torch

from dino.augmentation import ViewBatch
from dino.training.prefetch import prefetched


def windows(device: str, log: list[str], count: int = 4) -> Iterator[list[ViewBatch]]:
    for number in range(count):
        log.append(f"made {number}")
        images = torch.full((2, 3, 1, 64, 64), float(number))
        if device == "cuda":
            images = images.pin_memory()
        yield [ViewBatch(images, None, torch.arange(3), None, None, ()).to(device, non_blocking=True)]


def test_on_a_cpu_nothing_is_made_ahead() -> None:
    log: list[str] = []
    for number, (batch,) in enumerate(prefetched(windows("cpu", log), torch.device("cpu"))):
        log.append(f"used {number}")
        assert batch.global_views.unique().tolist() == [number]
    assert log == [f"{what} {number}" for number in range(4) for what in ("made", "used")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_next_window_is_made_when_a_step_is_queued() -> None:
    log: list[str] = []
    sums = []
    for number, (batch,) in enumerate(prefetched(windows("cuda", log, 20), torch.device("cuda"))):
        log.append(f"used {number}")
        busy = torch.randn(2000, 2000, device="cuda")
        for _ in range(20):
            busy = busy @ busy / 2000
        sums.append(batch.global_views.mean() + 0 * busy[0, 0].nan_to_num())
    assert log[:4] == ["made 0", "used 0", "made 1", "used 1"]
    assert torch.stack(sums).tolist() == pytest.approx(list(range(20)))
