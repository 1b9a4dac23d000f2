"""Training batches: the same with any number of workers, in spite of broken images, signals and early ends."""

import itertools
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dino import preemption, ranks
from dino.augmentation import MultiCrop, ViewBatch
from dino.dataset import Folder, ImageDataset, ShuffledSampler, Splits, StackedSource, TrainLoader

MakeFolder = Callable[..., Folder]
WriteImages = Callable[..., list[Path]]


def crops(channels: int = 3, **changes: object) -> MultiCrop:
    settings: dict[str, object] = {
        "global_size": 16,
        "local_size": 8,
        "num_local_views": 2,
        "channels": channels,
        "mean": [0.5] * channels,
        "std": [0.25] * channels,
    }
    return MultiCrop(**(settings | changes))  # type: ignore[arg-type]


class Memory(ImageDataset):
    """300 images of random pixels in memory, of which a label is the index modulo 10."""

    def _open(self) -> Splits:
        images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (300, 1, 8, 8), dtype=np.uint8))
        source = StackedSource(images, np.arange(300) % 10, "memory")
        return Splits(source, bank=source)


def memory(batch_size: int = 40, num_workers: int = 0) -> Memory:
    return Memory(
        name="memory",
        channels=1,
        mean=[0.5],
        std=[0.25],
        global_size=16,
        local_size=8,
        evaluation_resize=16,
        evaluation_size=16,
        batch_size=batch_size,
        num_workers=num_workers,
    )


def epoch_of(dataset: ImageDataset, epoch: int = 0, first: int = 0, **changes: object) -> list[ViewBatch]:
    return list(TrainLoader(dataset, crops(dataset.channels, **changes), seed=0).epoch(epoch, first))


def tensors(batch: ViewBatch) -> list[torch.Tensor]:
    """Everything in a batch, in a fixed order."""
    assert batch.local_views is not None
    found = [batch.global_views, batch.local_views, batch.indices]
    found += [] if batch.labels is None else [batch.labels]
    return found + ([] if batch.parameters is None else list(vars(batch.parameters).values()))


def assert_same(first: list[ViewBatch], second: list[ViewBatch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.bad == other.bad
        for a, b in zip(tensors(one), tensors(other), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("photometric_device", ["device", "cpu"])
def test_workers_change_nothing_in_memory(photometric_device: str) -> None:
    reference = epoch_of(memory(), epoch=1, photometric_device=photometric_device)
    assert len(reference) == 300 // 40
    assert (reference[0].parameters is None) == (photometric_device == "cpu")
    for num_workers in (2, 4):
        made = epoch_of(memory(num_workers=num_workers), epoch=1, photometric_device=photometric_device)
        assert_same(made, reference)


def test_workers_change_nothing_for_files(tmp_path: Path, write_images: WriteImages, folder: MakeFolder) -> None:
    write_images(tmp_path / "a", 7)
    write_images(tmp_path / "b", 6, first_seed=7)
    reference = epoch_of(folder(tmp_path, batch_size=3))
    assert [batch.global_views.shape for batch in reference] == [(2, 3, 3, 16, 16)] * 4
    for batch in reference:
        assert batch.labels is not None
        assert batch.labels.tolist() == [int(index >= 7) for index in batch.indices.tolist()]
    for num_workers in (2, 4):
        assert_same(epoch_of(folder(tmp_path, batch_size=3, num_workers=num_workers)), reference)


def test_batch_size_changes_no_view(tmp_path: Path, write_images: WriteImages, folder: MakeFolder) -> None:
    write_images(tmp_path, 12)
    for small, large in (
        (folder(tmp_path, batch_size=2), folder(tmp_path, batch_size=6)),
        (memory(batch_size=25), memory(batch_size=100)),
    ):
        for name in ("global_views", "local_views"):
            first, second = (
                torch.cat([getattr(batch, name) for batch in epoch_of(each)], 1) for each in (small, large)
            )
            assert torch.equal(first, second)


def test_starting_in_the_middle_gives_the_same_batches() -> None:
    assert_same(epoch_of(memory(), first=4), epoch_of(memory())[4:])


def test_two_ranks_share_the_batch_of_one(tmp_path: Path, write_images: WriteImages, folder: MakeFolder) -> None:
    write_images(tmp_path, 9)
    together = list(TrainLoader(folder(tmp_path, batch_size=4), crops(), seed=0).epoch(0))
    apart = [
        list(TrainLoader(folder(tmp_path, batch_size=2), crops(), seed=0, rank=rank, world_size=2).epoch(0))
        for rank in range(2)
    ]
    for whole, *parts in zip(together, *apart, strict=True):
        assert torch.equal(torch.cat([part.global_views for part in parts], 1), whole.global_views)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_random_streams_are_left_alone(num_workers: int) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    epoch_of(memory(num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_is_named_replaced_and_counted(
    tmp_path: Path,
    write_images: WriteImages,
    truncate: Callable[[Path], None],
    folder: MakeFolder,
    caplog: pytest.LogCaptureFixture,
    num_workers: int,
) -> None:
    files = write_images(tmp_path, 10, ".jpg")
    truncate(files[4])
    truncate(files[5])
    truncate(files[9])
    dataset = folder(tmp_path, batch_size=5, num_workers=num_workers, max_bad_fraction=0.3)
    loader = TrainLoader(dataset, crops(), seed=0)
    with caplog.at_level(logging.WARNING, logger="dino"):
        batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
    assert set(loader.bad_images) == {4, 5, 9}
    assert all("truncated" in reason.lower() for reason in loader.bad_images.values())
    for number in (4, 5, 9):  # each once, in two epochs
        assert [str(files[number]) in record.getMessage() for record in caplog.records].count(True) == 1
    for epoch in range(2):
        shown = sorted(index for batch in batches[2 * epoch : 2 * epoch + 2] for index in batch.indices.tolist())
        assert shown == [0, 0, 1, 2, 3, 6, 6, 6, 7, 8]  # 4 and 5 become 6, 9 becomes 0
        assert {index for batch in batches[2 * epoch : 2 * epoch + 2] for index in batch.bad} == {4, 5, 9}
    assert_same(
        batches[:2], list(TrainLoader(folder(tmp_path, batch_size=5, max_bad_fraction=0.3), crops(), seed=0).epoch(0))
    )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("broken", "fraction"), [(3, 0.2), (10, 0.9), (10, 1.0)])
def test_too_many_broken_images_stop_the_run_with_a_list(
    tmp_path: Path,
    write_images: WriteImages,
    truncate: Callable[[Path], None],
    folder: MakeFolder,
    num_workers: int,
    broken: int,
    fraction: float,
) -> None:
    for path in write_images(tmp_path, 10, ".jpg")[:broken]:
        truncate(path)
    dataset = folder(tmp_path, num_workers=num_workers, max_bad_fraction=fraction)
    with pytest.raises(ValueError, match=rf"10 training images.* dataset\.max_bad_fraction={fraction:g}") as caught:
        list(TrainLoader(dataset, crops(), seed=0).epoch(0))
    assert str(tmp_path / "0001.jpg") in str(caught.value)
    assert "truncated" in str(caught.value).lower()


def test_the_count_of_broken_images_survives_a_resume(
    tmp_path: Path, write_images: WriteImages, truncate: Callable[[Path], None], folder: MakeFolder
) -> None:
    files = write_images(tmp_path, 10, ".jpg")
    truncate(files[0])
    first = TrainLoader(folder(tmp_path, max_bad_fraction=0.1), crops(), seed=0)
    list(first.epoch(0))
    truncate(files[7])
    second = TrainLoader(folder(tmp_path, max_bad_fraction=0.1), crops(), seed=0)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="2 of 10 training images"):
        list(second.epoch(1))


def test_a_batch_larger_than_the_dataset_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"dataset\.batch_size=301\), but there are only 300 training images"):
        TrainLoader(memory(batch_size=301), crops(1), seed=0)


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_workers_survive_the_signals_that_preempt_a_run(number: signal.Signals) -> None:
    batches = TrainLoader(memory(num_workers=2), crops(1), seed=0).epoch(0)
    made = [next(batches), next(batches)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, number)
    made += list(batches)
    assert_same(made, epoch_of(memory()))
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_workers_survive_signals_while_they_start(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    set_num_threads = torch.set_num_threads

    def signalled(num_threads: int) -> None:
        """The DataLoader calls it in a worker, after it has set a handler of its own for SIGTERM."""
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), number)
        set_num_threads(num_threads)

    monkeypatch.setattr(torch, "set_num_threads", signalled)
    assert_same(list(TrainLoader(memory(num_workers=2), crops(1), seed=0).epoch(0)), epoch_of(memory()))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(preemption.SIGNALS)


def test_an_error_that_still_refers_to_the_loader_does_not_hang_the_exit() -> None:
    """As it is at an uncaught error: its traceback is kept until Python ends."""
    program = (
        "from test_loader import TrainLoader, crops, memory\n"
        "augmentation = crops(1)\n"
        "augmentation.views = None\n"
        "next(TrainLoader(memory(num_workers=2), augmentation, seed=0).epoch(0))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("TypeError: 'NoneType' object is not callable")  # and nothing of the exit


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_signals_to_the_whole_group_leave_the_loader_reading(kind: str) -> None:
    """One of each kind: the main process notes them, the workers ignore them, and every batch comes."""
    program = (
        "import multiprocessing, os, sys\n"
        "from dino import preemption\n"
        "from dino.dataset import EvaluationLoader\n"
        "from test_loader import TrainLoader, crops, memory\n"
        "preemption.listen()\n"
        "if sys.argv[1] == 'training':\n"
        "    batches = TrainLoader(memory(num_workers=2), crops(1), seed=0).epoch(0)\n"
        "else:\n"
        "    batches = iter(EvaluationLoader(memory().train(), 8, 8, 40, num_workers=2))\n"
        "next(batches)\n"
        "workers = multiprocessing.active_children()\n"
        "for number in preemption.SIGNALS:\n"
        "    os.killpg(0, number)\n"
        "    next(batches)\n"
        "print(preemption.requested(), [worker.is_alive() for worker in workers], sum(1 for _ in batches))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, kind],
        cwd=Path(__file__).parent,
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    num_left = {"training": 7 - 5, "evaluation": 8 - 5}[kind]  # of 300 images in batches of 40
    assert done.stdout == f"True [True, True] {num_left}\n"


def test_ranks_share_what_they_could_not_read(
    tmp_path: Path,
    write_images: WriteImages,
    truncate: Callable[[Path], None],
    folder: MakeFolder,
    run_ranks: Callable[..., list[Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = write_images(tmp_path, 12, ".jpg")
    for number in (2, 7, 11):
        truncate(files[number])

    def two_epochs() -> tuple[set[int], list[str], list[list[int]]]:
        dataset = folder(tmp_path, batch_size=3, max_bad_fraction=0.25)
        loader = TrainLoader(dataset, crops(), seed=0, rank=ranks.rank(), world_size=ranks.world_size())
        seen = []
        own: set[int] = set()
        for epoch in range(2):
            for batch in loader.epoch(epoch):
                own |= set(batch.bad)
            loader.share_bad_images()
            seen.append(list(loader.bad_images))
        return own, caplog.messages, seen

    (one, said, shared), (other, also_said, also_shared) = run_ranks(two_epochs, 2)
    assert one
    assert other
    assert shared == also_shared == [[2, 7, 11]] * 2
    warnings = said + also_said
    assert [sum(f"{files[number]}: " in line for line in warnings) for number in (2, 7, 11)] == [1, 1, 1]


def test_too_many_unreadable_images_of_all_ranks_stop_every_rank(
    tmp_path: Path,
    write_images: WriteImages,
    truncate: Callable[[Path], None],
    folder: MakeFolder,
    run_ranks: Callable[..., list[Any]],
) -> None:
    """One each is allowed for a single rank; together it is too much."""
    files = write_images(tmp_path, 12, ".jpg")
    order = next(ShuffledSampler(12, 6, seed=0, rank=0, world_size=2).batches(0)).tolist()
    broken = sorted([order[0], next(number for number in range(12) if number not in order)])
    for number in broken:
        truncate(files[number])

    def one_epoch() -> str:
        dataset = folder(tmp_path, batch_size=6, max_bad_fraction=0.1)
        loader = TrainLoader(dataset, crops(), seed=0, rank=ranks.rank(), world_size=ranks.world_size())
        list(loader.epoch(0))
        assert len(loader.bad_images) == 1
        with pytest.raises(ValueError, match=r"2 of 12 training images.* dataset\.max_bad_fraction=0\.1") as caught:
            loader.share_bad_images()
        return str(caught.value)

    one, other = run_ranks(one_epoch, 2)
    assert one == other
    assert all(str(files[number]) in one for number in broken)


def test_sharing_changes_nothing_for_a_single_process() -> None:
    loader = TrainLoader(memory(), crops(1), seed=0)
    loader.load_state_dict({"bad_images": {3: "broken"}})
    loader._max_bad_fraction = 0.5
    loader.share_bad_images()
    assert loader.state_dict() == {"bad_images": {3: "broken"}}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_see_every_image_exactly_once_an_epoch(
    world_size: int, run_ranks: Callable[..., list[Any]]
) -> None:
    """Of 300 images, 9 batches of 32 are 288; only the incomplete last batch is dropped."""

    def seen() -> list[list[int]]:
        dataset = memory(batch_size=32 // ranks.world_size())
        loader = TrainLoader(dataset, crops(1), seed=0, rank=ranks.rank(), world_size=ranks.world_size())
        return [batch.indices.tolist() for batch in loader.epoch(1)]

    together = [list(itertools.chain(*parts)) for parts in zip(*run_ranks(seen, world_size), strict=True)]
    assert together == [batch.indices.tolist() for batch in epoch_of(memory(batch_size=32), epoch=1)]
    images = list(itertools.chain(*together))
    assert len(images) == len(set(images)) == 288


def test_the_batches_of_two_ranks_are_the_halves_of_the_batch_of_one(run_ranks: Callable[..., list[Any]]) -> None:
    def first_batch() -> list[np.ndarray[Any, Any]]:
        loader = TrainLoader(memory(batch_size=16), crops(1), seed=0, rank=ranks.rank(), world_size=2)
        batch = next(loader.epoch(0))
        assert batch.local_views is not None
        return [batch.global_views.numpy(), batch.local_views.numpy()]

    whole = epoch_of(memory(batch_size=32))[0]
    for views, *halves in zip((whole.global_views, whole.local_views), *run_ranks(first_batch, 2), strict=True):
        assert views is not None
        assert np.array_equal(np.concatenate(halves, axis=1), views.numpy())


def test_leaving_an_epoch_early_ends_its_workers() -> None:
    batches = TrainLoader(memory(num_workers=2), crops(1), seed=0).epoch(0)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    del batches
    assert not any(worker.is_alive() for worker in workers)


def test_a_program_that_ends_in_an_epoch_does_not_hang() -> None:
    program = (
        "from test_loader import TrainLoader, crops, memory\n"
        "batches = TrainLoader(memory(num_workers=2), crops(1), seed=0).epoch(0)\n"
        "next(batches)\n"
        "raise SystemExit(75)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, timeout=60)
    assert result.returncode == 75


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_pinned_batches_are_the_same(num_workers: int) -> None:
    loader = TrainLoader(memory(num_workers=num_workers), crops(1), seed=0, pin_memory=True)
    pinned = list(loader.epoch(0))
    assert all(batch.global_views.is_pinned() for batch in pinned)
    assert_same(pinned, epoch_of(memory()))
