"""`dino data bench`: the shares, the advice, and the command on files and on a set in memory."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from command_line import DINO, TINY

from dino.augmentation import MultiCrop, ViewBatch
from dino.dataset import Folder, bench
from dino.dataset.bench import LoaderSpeed, advised, counts_to_try, wait_share

SMALL = ["augmentation.global_size=32", "augmentation.local_size=16", "augmentation.num_local_views=2"]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DINO, "data", "bench", *words],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(("cores", "counts"), [(1, [0, 1]), (2, [0, 1, 2]), (6, [0, 1, 2, 4, 6]), (8, [0, 1, 2, 4, 8])])
def test_workers_are_tried_up_to_the_usable_cores(cores: int, counts: list[int]) -> None:
    assert counts_to_try(cores) == counts


def test_how_long_a_step_waits() -> None:
    """Without workers for all of it, with workers for what they need longer than a step, and for what is not theirs."""

    def share(batch_s: float, handing_over_s: float, step_s: float, num_workers: int) -> float:
        return wait_share(batch_s, handing_over_s, step_s, step_s, num_workers)

    assert share(batch_s=3.0, handing_over_s=0.0, step_s=1.0, num_workers=0) == 0.75
    assert share(batch_s=0.5, handing_over_s=0.0, step_s=1.0, num_workers=1) == 0.0
    assert share(batch_s=2.0, handing_over_s=0.0, step_s=1.0, num_workers=4) == 0.5
    assert share(batch_s=0.5, handing_over_s=0.25, step_s=0.75, num_workers=4) == 0.25
    assert share(batch_s=2.0, handing_over_s=0.25, step_s=0.75, num_workers=4) == pytest.approx(1.25 / 2)


def test_a_step_that_runs_by_itself_waits_only_for_what_takes_longer() -> None:
    def share(batch_s: float, handing_over_s: float, num_workers: int) -> float:
        return wait_share(batch_s, handing_over_s, step_s=1.0, queueing_s=0.25, num_workers=num_workers)

    assert share(batch_s=0.5, handing_over_s=0.25, num_workers=0) == 0.0
    assert share(batch_s=1.5, handing_over_s=0.25, num_workers=0) == 0.5
    assert share(batch_s=0.5, handing_over_s=0.75, num_workers=2) == 0.0
    assert share(batch_s=0.5, handing_over_s=1.75, num_workers=2) == 0.5
    assert share(batch_s=2.0, handing_over_s=0.25, num_workers=2) == 0.5


@pytest.mark.parametrize(
    ("measured", "right"),
    [
        ([(0, 100, None), (1, 300, None), (2, 590, None), (4, 600, None)], 2),
        ([(0, 100, None), (1, 60, None)], 0),
        ([(0, 100, 0.08), (1, 300, 0.0)], 0),
        ([(0, 100, 0.8), (1, 300, 0.4), (2, 600, 0.06), (4, 900, 0.0)], 2),
        ([(0, 100, 0.8), (1, 300, 0.51), (2, 310, 0.5)], 1),
    ],
)
def test_no_more_workers_are_advised_than_pay(measured: list[tuple[int, float, float | None]], right: int) -> None:
    assert advised([LoaderSpeed(*each) for each in measured]) == right


@pytest.mark.parametrize("photometric_device", ["cpu", "device"])
@pytest.mark.parametrize("scaled", [True, False])
def test_stages_of_files(
    tmp_path: Path,
    write_images: Callable[..., list[Path]],
    truncate: Callable[[Path], None],
    folder: Callable[..., Folder],
    photometric_device: str,
    scaled: bool,
) -> None:
    """A broken image does not stop it; the step gets a full batch of float views."""
    truncate(write_images(tmp_path, 9, ".jpg")[4])
    dataset = folder(tmp_path, batch_size=4, max_bad_fraction=0.5, scaled_decoding=scaled)
    augmentation = MultiCrop(global_size=8, local_size=4, num_local_views=1, photometric_device=photometric_device)  # type: ignore[arg-type]
    seen: list[ViewBatch] = []
    report = bench(
        dataset, augmentation, torch.device("cpu"), seed=0, seconds=0.01, step=seen.append, worker_counts=[0]
    )
    by_workers = ["photometric", "normalise"] if photometric_device == "cpu" else ["photometric"]
    assert list(report.stages) == ["read", "decode", "crop", *by_workers]
    assert all(seconds >= 0 for seconds in report.stages.values())
    assert [loader.num_workers for loader in report.loaders] == [0]
    assert report.step_s is not None
    assert report.advised_workers == 0
    assert seen[0].global_views.shape == (2, 4, 3, 8, 8)
    assert seen[0].global_views.dtype == torch.float32
    assert dataset.num_workers == 0
    assert torch.get_num_threads() >= 1


@dataclass(kw_only=True, eq=False)
class NotingThreads(MultiCrop):
    seen: set[int] = field(default_factory=set)

    def photometric(self, batch: ViewBatch) -> ViewBatch:
        self.seen.add(torch.get_num_threads())
        return super().photometric(batch)


def test_stages_are_those_of_one_core_and_views_are_handed_over_by_all_threads_of_the_run(
    tmp_path: Path, write_images: Callable[..., list[Path]], folder: Callable[..., Folder]
) -> None:
    write_images(tmp_path, 4, ".jpg")
    augmentation = NotingThreads(global_size=8, local_size=4, num_local_views=1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        bench(
            folder(tmp_path, batch_size=4), augmentation, torch.device("cpu"), seed=0, seconds=0.01, worker_counts=[0]
        )
    finally:
        torch.set_num_threads(before)
    assert augmentation.seen == {1, 3}


def test_a_batch_larger_than_the_set_is_refused_before_anything_is_measured() -> None:
    done = command(*TINY, "dataset.batch_size=5000")
    assert done.returncode == 2
    assert "set dataset.batch_size to at most" in done.stderr
    assert "measuring" not in done.stderr


def test_on_a_set_in_memory_with_a_step_as_json() -> None:
    done = command(*TINY, "trainer.device=cpu", "--step", "--json", "--seconds", "0.05")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[:3] == [
        f"measuring   {what}" for what in ("stages, on one core", "training steps", "loader, no workers")
    ]
    report = json.loads(done.stdout)
    assert list(report["stages"]) == ["read", "crop", "photometric"]
    assert report["in_memory"]
    assert report["limit"] in report["stages"]
    assert report["step_s"] > 0
    assert report["batch_size"] == 64
    tried = [loader["num_workers"] for loader in report["loaders"]]
    assert tried == counts_to_try(report["num_cores"])[: len(tried)]
    assert len(tried) >= 2
    assert all(0 <= loader["wait_share"] <= 1 for loader in report["loaders"])
    assert all(loader["images_per_s"] > 0 for loader in report["loaders"])


def test_on_files_as_a_table(tmp_path: Path, write_images: Callable[..., list[Path]]) -> None:
    write_images(tmp_path, 12, ".jpg")
    words = ["dataset=folder", f"dataset.root={tmp_path}", "dataset.batch_size=4", "trainer.device=cpu", *SMALL]
    done = command(*words, "--seconds", "0.05")
    assert done.returncode == 0, done.stderr
    for word in ("read", "decode", "crop", "photometric", "limit", "no workers", "dataset.num_workers="):
        assert word in done.stdout
    assert "a step waits" not in done.stdout


def test_what_cannot_be_measured_is_said_in_one_line(tmp_path: Path) -> None:
    missing = command("dataset=folder", f"dataset.root={tmp_path / 'nowhere'}")
    assert missing.returncode == 2
    assert "nowhere: there is no such file or folder" in missing.stderr
    assert "Traceback" not in missing.stderr
    (tmp_path / "broken").mkdir()
    for number in range(4):
        (tmp_path / "broken" / f"{number}.jpg").write_bytes(b"\xff\xd8\xff")
    broken = command("dataset=folder", f"dataset.root={tmp_path / 'broken'}", "dataset.batch_size=2", *SMALL)
    assert broken.returncode == 2
    assert "none of 2 training images can be read" in broken.stderr
