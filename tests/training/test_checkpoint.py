"""Checkpoints: whole or not at all, verified, the newest valid one found by itself; every failure in one sentence."""

import contextlib
import errno
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dino import checkpoint_files
from dino.training import checkpoint
from dino.training.checkpoint import CheckpointStore, SaveError

MIB = 2**20


def state(value: float, numel: int = 64) -> dict[str, Any]:
    return {
        "step": int(value),
        "weights": torch.full((numel,), float(value)),
        "nested": [{"betas": (0.9, 0.999)}, None, "text"],
    }


def save(store: CheckpointStore, step: int, *, best_step: int | None = None, stays: bool = False) -> Path:
    store.save(step, state(step), {"train/loss": step / 2}, best_step=best_step, stays=stays)
    store.wait()
    assert store.take_error() is None
    return store.directory / f"step_{step:08d}.pt"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("dino"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="dino")
    return caplog


# ---------------------------------------------------------------------- saving


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path, keep=2), 7)
    assert path.name == "step_00000007.pt"
    for loaded in (checkpoint.load(path), checkpoint.load(tmp_path / "last.pt")):
        assert torch.equal(loaded["weights"], state(7)["weights"])
        assert (loaded["step"], loaded["nested"]) == (7, state(7)["nested"])


def test_what_changes_after_save_does_not_change_the_file(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    saved, metrics = state(1, numel=4 * MIB), {"train/loss": 1.0}
    store.save(1, saved, metrics)
    saved["weights"].zero_()
    saved["nested"][0]["betas"] = (0.0, 0.0)
    metrics["train/loss"] = 2.0
    store.wait()
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(loaded["weights"], torch.ones(4 * MIB))
    assert loaded["nested"][0]["betas"] == (0.9, 0.999)
    assert checkpoint_files.entries(store.directory)[0].metrics == {"train/loss": 1.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_state_on_the_gpu_is_copied_before_save_returns(tmp_path: Path) -> None:
    store, weights = CheckpointStore(tmp_path, keep=1), torch.ones(64 * MIB, device="cuda")
    weights.mul_(3)  # still in the queue of the device
    store.save(1, {"weights": weights}, {})
    weights.zero_()
    store.wait()
    assert torch.equal(checkpoint.load(tmp_path / "last.pt")["weights"], torch.full((64 * MIB,), 3.0))


def test_save_returns_while_the_write_goes_on_and_never_two_are_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, released, in_flight, most = os.fsync, threading.Event(), set[int](), [0]

    def held_fsync(descriptor: int) -> None:
        in_flight.add(threading.get_ident())
        most[0] = max(most[0], len(in_flight))
        assert released.wait(timeout=60)
        fsync(descriptor)
        in_flight.discard(threading.get_ident())

    monkeypatch.setattr(os, "fsync", held_fsync)
    store = CheckpointStore(tmp_path, keep=9)
    store.save(1, state(1), {})
    assert not (tmp_path / "step_00000001.pt").exists()  # save is back, the write is held
    threading.Timer(0.2, released.set).start()
    for step in (2, 3, 4):
        store.save(step, state(step), {})
        assert checkpoint.load(tmp_path / f"step_{step - 1:08d}.pt")["step"] == step - 1  # the one before is whole
    store.wait()
    assert most == [1]
    assert [entry.step for entry in checkpoint_files.entries(store.directory) if entry.valid] == [4, 3, 2, 1]


def test_foreign_types_are_refused_at_save_and_leave_no_file(tmp_path: Path) -> None:
    class Foreign(list[int]):
        pass

    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    with pytest.raises(TypeError, match=r"state\['optimizer'\]\['betas'\] is a Foreign"):
        store.save(1, {"optimizer": {"betas": Foreign([1])}}, {})
    assert not (tmp_path / "checkpoints").exists()


def test_every_file_that_is_written_loads_with_weights_only(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
        store.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, {}, best_step=1)
    store.wait()
    files = list(tmp_path.glob("*.pt"))
    assert len(files) == 4  # two steps, last, best
    for path in files:
        loaded = torch.load(path, weights_only=True)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])


# ---------------------------------------------------------------------- retention


def test_only_the_newest_stay_and_the_best_is_never_pruned(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 8):
        save(store, step, best_step=2 if step >= 2 else None, stays=step == 3)
    kept = {"step_00000002", "step_00000003", "step_00000006", "step_00000007"}
    assert names(tmp_path) == {f"{name}.{end}" for name in kept for end in ("pt", "json")} | {"last.pt", "best.pt"}
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 2
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 7
    assert {entry.step for entry in checkpoint_files.entries(store.directory) if entry.stays} == {3}


def test_last_can_be_pointed_to_the_best_until_the_next_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1, best_step=1)
    save(store, 2, best_step=1)
    store.point_last_to_best()
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1
    assert store.newest_valid() == tmp_path / "step_00000002.pt"
    save(store, 3)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3


def test_a_best_one_that_was_not_linked_is_linked_by_the_next_save_before_anything_is_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)  # killed before best.pt was linked
    assert store.best() is None
    save(store, 2, best_step=1)
    assert store.best() == tmp_path / "step_00000001.pt"
    save(store, 3, best_step=9)  # never written: the one before remains
    assert store.best() == tmp_path / "step_00000001.pt"


def test_best_can_be_repaired_without_a_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    store.point_best_to(1)
    assert not store.directory.exists()
    for step in (1, 2):
        save(store, step)
    store.point_best_to(None)
    store.point_best_to(7)
    assert store.best() is None
    for step in (1, 2, 2):
        store.point_best_to(step)
        assert store.best() == store.directory / f"step_{step:08d}.pt"
    (store.directory / "step_00000002.pt").unlink()
    assert store.best() is None
    store.point_best_to(1)
    assert store.best() == store.directory / "step_00000001.pt"


def test_later_checkpoints_are_set_aside_whole_and_never_overwrite_each_other(tmp_path: Path) -> None:
    store, aside = CheckpointStore(tmp_path, keep=9), tmp_path / "abandoned"
    for step in (10, 20, 30):
        save(store, step, best_step=step)
    assert store.set_aside(30) == []
    assert not aside.exists()
    os.truncate(tmp_path / "step_00000030.pt", 10)
    assert store.set_aside(10) == [aside / "step_00000030.pt", aside / "step_00000020.pt"]
    assert names(tmp_path) == {"step_00000010.pt", "step_00000010.json", "last.pt", "abandoned"}
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 10
    assert store.newest_valid() == tmp_path / "step_00000010.pt"
    assert [entry.step for entry in checkpoint_files.entries(store.directory)] == [10]

    for number in (1, 2):
        store.save(20, state(20 + number), {})
        store.wait()
        (moved,) = store.set_aside(10)
        assert moved == aside / f"step_00000020.{number}.pt"
    assert [checkpoint.load(aside / f"step_00000020{end}.pt")["step"] for end in ("", ".1", ".2")] == [20, 21, 22]

    store.point_best_to(10)
    assert store.set_aside(0) == [aside / "step_00000010.pt"]
    assert names(tmp_path) == {"abandoned"}
    assert store.newest_valid() is None


def test_links_to_what_remains_are_left_alone_when_others_are_set_aside(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    for step in (1, 2, 3):
        save(store, step, best_step=1)
    store.point_last_to_best()
    store.set_aside(2)
    assert (tmp_path / "last.pt").resolve() == store.best() == tmp_path / "step_00000001.pt"


def test_setting_aside_that_is_cut_short_leaves_no_link_to_nothing_and_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, move = CheckpointStore(tmp_path, keep=9), checkpoint_files.move
    for step in (1, 2, 3):
        save(store, step, best_step=3)

    def failing(temporary: Path, path: Path) -> None:
        if path.name == "step_00000002.pt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        move(temporary, path)

    monkeypatch.setattr(checkpoint_files, "move", failing)
    with pytest.raises(OSError, match="Input/output"):
        store.set_aside(1)
    assert (tmp_path / "last.pt").resolve() == tmp_path / "step_00000001.pt"
    assert store.newest_valid() == tmp_path / "step_00000002.pt"
    monkeypatch.undo()
    (moved,) = store.set_aside(1)
    assert checkpoint.load(moved)["step"] == 2
    assert checkpoint.load(tmp_path / "abandoned" / "step_00000003.pt")["step"] == 3


def test_a_truncated_file_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1)
    os.truncate(save(store, 2), 100)
    save(store, 3)
    assert [entry.step for entry in checkpoint_files.entries(store.directory) if entry.valid] == [3, 1]


def test_what_was_just_written_is_kept_beside_newer_files_whose_damage_is_not_known(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    flip_a_byte(save(store, 20, stays=True))
    flip_a_byte(save(store, 30))
    save(store, 10)
    assert store.newest_valid() == tmp_path / "step_00000010.pt"


def test_a_step_that_is_saved_again_is_valid_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, seen, move = CheckpointStore(tmp_path, keep=1), [], checkpoint.move
    save(store, 1)

    def looking(temporary: Path, path: Path) -> None:  # between sidecar and checkpoint, where a kill hurts most
        seen.append(store.newest_valid())
        move(temporary, path)

    monkeypatch.setattr(checkpoint, "move", looking)
    store.save(1, state(2), {})
    store.wait()
    assert seen == [tmp_path / "step_00000001.pt"]
    assert checkpoint.load(tmp_path / "step_00000001.pt")["weights"][0] == 2


def test_tidy_removes_what_a_killed_process_leaves_and_nothing_else(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1, best_step=1)
    before = names(tmp_path)
    for name in ("step_00000002.pt.tmp", "step_00000002.json.tmp", "last.pt.tmp", "step_00000003.json"):
        (tmp_path / name).write_text("{}")
    store.tidy()
    assert names(tmp_path) == before
    CheckpointStore(tmp_path / "absent", keep=1).tidy()


# ---------------------------------------------------------------------- damage


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": (lambda path: os.truncate(path, 100), "its size is 100 bytes, but "),
    "one byte flipped": (flip_a_byte, "its checksum differs from the one written"),
    "no sidecar": (lambda path: path.with_suffix(".json").unlink(), "step_00000002.json is missing"),
    "broken sidecar": (lambda path: path.with_suffix(".json").write_text("{"), "step_00000002.json is missing or unr"),
    "deleted": (lambda path: path.unlink(), "it is gone"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_once_and_the_one_before_it_used(
    tmp_path: Path, logged: pytest.LogCaptureFixture, damage: str
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    save(store, 1)
    newest = save(store, 2)
    do, problem = DAMAGE[damage]
    do(newest)
    assert store.newest_valid() == tmp_path / "step_00000001.pt"
    (record,) = logged.records
    assert str(newest) in record.message
    assert problem in record.message
    with pytest.raises(ValueError, match=f"resume={newest}: .*{'no such' if damage == 'deleted' else 'damaged'}"):
        checkpoint.load(newest)


def test_without_a_valid_checkpoint_there_is_none(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    assert store.newest_valid() is None
    assert not logged.records
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        checkpoint.load(tmp_path / "step_00000001.pt")
    (tmp_path / "step_00000003.json").write_text("{}")  # killed in the very first save
    (tmp_path / "step_00000003.pt.tmp").touch()
    assert store.newest_valid() is None
    assert not logged.records


def test_without_a_valid_one_among_the_checkpoints_all_are_named_in_one_sentence(
    tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, keep=3)
    first, second, _, fourth = (save(store, step, stays=True) for step in (1, 2, 3, 4))
    flip_a_byte(first)
    os.truncate(second, 0)
    (folder / "step_00000003.pt").unlink()
    (folder / "step_00000003.pt").mkdir()
    fourth.unlink()
    with pytest.raises(ValueError, match="none of its checkpoints is valid") as refused:
        store.newest_valid()
    size = checkpoint_files.read_sidecar(folder / "step_00000002.pt")["bytes"]  # type: ignore[index]
    assert str(refused.value) == (
        f"{tmp_path}: none of its checkpoints is valid (step_00000004.pt: it is gone; "
        f"step_00000003.pt: it is a folder, not a file; step_00000002.pt: its size is 0 bytes, but {size} were "
        "written; step_00000001.pt: its checksum differs from the one written)"
    )
    assert not logged.records  # nothing before them is used


class Malicious:
    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.evidence),)


def with_matching_checksum(path: Path) -> Path:
    content = {"sha256": checkpoint_files.checksum(path), "bytes": path.stat().st_size, "metrics": {}, "saved": 0.0}
    path.with_suffix(".json").write_text(json.dumps({"step": 1, "stays": False, "replaces": [], **content}))
    return path


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_a_malicious_pickle_with_a_matching_checksum_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    evidence, path = tmp_path / "evidence", tmp_path / "step_00000001.pt"
    if form == "zip":
        torch.save({"step": 1, "model": Malicious(evidence)}, path)
    else:
        path.write_bytes(pickle.dumps({"step": 1, "model": Malicious(evidence)}, protocol=2))
    with_matching_checksum(path)
    with pytest.raises(ValueError, match=f"^resume={path}: not a checkpoint of a run") as refused:
        checkpoint.load(path)
    assert len(str(refused.value).splitlines()) == 1
    assert not evidence.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert evidence.exists()  # it would have worked


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, pickle.dumps([1, 2], protocol=2)])
def test_garbage_with_a_matching_checksum_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step_00000001.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^resume={path}: not a checkpoint of a run"):
        checkpoint.load(with_matching_checksum(path))


# ---------------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_too_little_free_space_is_said_before_anything_is_written(
    small_disk: Path, logged: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(small_disk / "checkpoints", keep=1)
    good, before = save(store, 1), names(store.directory)
    store.save(2, state(2, numel=2 * MIB), {})
    error = store.take_error()
    assert str(error) == f"checkpoint of step 2 needs 9.0 MiB, only 8.0 MiB are free at {store.directory}"
    assert [record.message for record in logged.records] == [str(error)]
    assert store.take_error() is None
    assert names(store.directory) == before
    assert store.newest_valid() == good


def test_a_disk_that_fills_up_during_the_write_is_said_and_the_last_good_one_loads(
    small_disk: Path, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(small_disk / "checkpoints", keep=1)
    good, before = save(store, 1), names(store.directory)
    ask = CheckpointStore._ask_for_space

    def ask_then_fill(self: CheckpointStore, step: int, num_bytes: int) -> None:
        ask(self, step, num_bytes)
        (small_disk / "other").write_bytes(bytes(6 * MIB))  # somebody else writes, after the question

    monkeypatch.setattr(CheckpointStore, "_ask_for_space", ask_then_fill)
    store.save(2, state(2, numel=MIB), {})
    store.wait()
    error = store.take_error()
    assert str(error) == (
        f"checkpoint of step 2 could not be written: No space left on device ({store.directory}/step_00000002.pt)"
    )
    assert [record.message for record in logged.records] == [str(error)]  # no second try
    assert names(store.directory) == before
    assert checkpoint.load(good)["step"] == 1

    monkeypatch.undo()
    (small_disk / "other").unlink()
    store.save(3, state(3, numel=MIB), {})
    store.wait()
    assert store.take_error() is None
    assert checkpoint.load(small_disk / "checkpoints" / "last.pt")["step"] == 3


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from dino.training.checkpoint import CheckpointStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store = CheckpointStore(Path(sys.argv[1]), keep=2)
for step, numel in ((1, 10), (2, 100_000)):
    store.save(step, {"weights": torch.ones(numel)}, {})
    store.wait()
    print(store.take_error())
"""


def test_the_true_reason_is_shown_when_torch_hides_it(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines() == [
        "None",
        f"checkpoint of step 2 could not be written: File too large ({tmp_path}/step_00000002.pt)",
    ], result.stderr
    assert names(tmp_path) == {"step_00000001.pt", "step_00000001.json", "last.pt"}


@pytest.mark.parametrize(("times", "saved"), [(2, True), (99, False)])
def test_transient_errors_are_retried_with_a_warning_each(
    tmp_path: Path, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, times: int, saved: bool
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    good, fsync, failures = save(store, 1), os.fsync, iter(range(times))

    def failing(descriptor: int) -> None:
        if next(failures, None) is not None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr(checkpoint, "RETRY_WAITS_S", (0.01, 0.02, 0.04))
    store.save(2, state(2), {})
    store.wait()
    levels = [record.levelname for record in logged.records]
    assert all("Input/output error" in record.message for record in logged.records)
    if saved:
        assert levels == ["WARNING"] * 2
        assert store.take_error() is None
        assert store.newest_valid() == tmp_path / "step_00000002.pt"
    else:
        assert levels == ["WARNING"] * 3 + ["ERROR"]
        assert "checkpoint of step 2 could not be written" in str(store.take_error())
        assert store.newest_valid() == good
    assert store.saved_step == (2 if saved else 1)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_error_waits_until_it_is_taken_also_behind_a_later_save(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, keep=1)
    folder.write_text("in the way")
    store.save(1, state(1), {})
    store.wait()
    folder.unlink()
    store.save(2, state(2), {})
    store.wait()
    assert "checkpoint of step 1 could not be written" in str(store.take_error())
    assert store.take_error() is None
    assert store.newest_valid() == folder / "step_00000002.pt"


@pytest.mark.parametrize("times", [1, 99])
def test_a_step_whose_replacing_fails_stays_valid_and_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    store, move, failures = CheckpointStore(tmp_path, keep=2), checkpoint.move, iter(range(times))
    path = save(store, 5)

    def failing(temporary: Path, path: Path) -> None:
        if next(failures, None) is not None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(temporary), None, str(path))
        move(temporary, path)

    monkeypatch.setattr(checkpoint, "move", failing)
    monkeypatch.setattr(checkpoint, "RETRY_WAITS_S", (0.01, 0.02))
    for value in (6, 7):  # two in a row, the first of which may leave its checksum only
        store.save(5, state(value), {})
        store.wait()
        assert checkpoint_files.find_problem(path) is None
        assert store.newest_valid() == path
    assert checkpoint.load(path)["step"] == (7 if times == 1 else 5)
    assert (store.take_error() is None) == (times == 1)
    monkeypatch.undo()
    flip_a_byte(path)
    assert checkpoint_files.find_problem(path) == "its checksum differs from the one written"


def test_an_error_names_the_file_that_it_is_about(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    (tmp_path / "last.pt").mkdir()
    store = CheckpointStore(tmp_path, keep=1)
    store.save(48, state(48), {})
    store.wait()
    error = store.take_error()
    assert str(error) == f"checkpoint of step 48 could not be written: Is a directory ({tmp_path}/last.pt)"
    assert [record.message for record in logged.records] == [str(error)]


def test_old_checkpoints_that_cannot_be_removed_are_named_and_the_save_has_succeeded(
    tmp_path: Path, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, unlink = CheckpointStore(tmp_path, keep=1), Path.unlink
    old = save(store, 1)

    def failing(path: Path, missing_ok: bool = False) -> None:
        if path == old:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", failing)
    save(store, 2)
    assert [record.message for record in logged.records] == [
        f"older checkpoints could not be removed: Permission denied ({old})"
    ]
    assert store.saved_step == 2


def test_a_folder_in_the_place_of_a_checkpoint_does_not_keep_old_ones_from_being_removed(
    tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)
    (tmp_path / "step_00000002.pt").mkdir()
    save(store, 3)
    assert not (tmp_path / "step_00000001.pt").exists()
    assert not logged.records


def test_a_save_that_could_not_begin_waits_as_an_error_too(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.fail(3, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/metrics.jsonl"))
    error = store.take_error()
    assert isinstance(error, SaveError)
    assert str(error) == "checkpoint of step 3 could not be written: No space left on device (/run/metrics.jsonl)"
    assert [record.message for record in logged.records] == [str(error)]
    assert store.take_error() is None
    assert store.saved_step is None


@pytest.mark.parametrize("dangling", [False, True])
def test_a_file_in_the_place_of_the_folder_is_refused_at_once(tmp_path: Path, dangling: bool) -> None:
    folder = tmp_path / "checkpoints"
    folder.symlink_to("nowhere") if dangling else folder.touch()
    with pytest.raises(ValueError, match=f"^run_dir={tmp_path}: checkpoints is not a folder$"):
        CheckpointStore(folder, keep=1)


# ---------------------------------------------------------------------- kills

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from dino.training import checkpoint
from dino.training.checkpoint import CheckpointStore

folder, step, while_writing = Path(sys.argv[1]), 0, 0
store = CheckpointStore(folder, keep=2)
random.seed(0)
for kill in range(20):
    child = os.fork()
    if child == 0:
        while True:
            step += 1
            weights = torch.full((100_000,), float(step))
            store.save(step, {"step": step, "weights": weights}, {}, best_step=step - step % 3)
    deadline = time.monotonic() + 60
    while not (folder / f"step_{step + 4:08d}.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while_writing += bool(list(folder.glob("*.tmp")))
    state = checkpoint.load(store.newest_valid())
    assert state["step"] >= step + 4, (state["step"], step)
    assert bool((state["weights"] == state["step"]).all())
    assert (folder / "last.pt").exists() and (folder / "best.pt").exists()
    store.tidy()
    assert not list(folder.glob("*.tmp"))
    step = state["step"]
print("killed while writing", while_writing)
"""


def test_after_sigkill_at_twenty_random_moments_the_newest_valid_one_loads(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[-1]) >= 2  # otherwise the moments were badly chosen


def test_the_interpreter_finishes_the_write_before_it_exits(tmp_path: Path) -> None:
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom dino.training.checkpoint import CheckpointStore\n"
        "CheckpointStore(Path(sys.argv[1]), keep=1).save(1, {'weights': torch.ones(5_000_000)}, {})\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)
    assert checkpoint.load(tmp_path / "last.pt")["weights"].sum() == 5_000_000


# ---------------------------------------------------------------------- listing


def test_entries_tell_everything_about_every_checkpoint(tmp_path: Path) -> None:
    store, started = CheckpointStore(tmp_path, keep=2), time.time()
    save(store, 1, stays=True)
    save(store, 2, best_step=2)
    os.truncate(save(store, 3), 10)
    newest, middle, oldest = checkpoint_files.entries(store.directory)
    assert [(entry.last, entry.best, entry.stays) for entry in (newest, middle, oldest)] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert (newest.size, newest.valid) == (10, False)
    assert newest.problem is not None
    assert "its size is 10 bytes" in newest.problem
    assert middle.valid
    assert (middle.step, middle.size, middle.metrics) == (2, middle.path.stat().st_size, {"train/loss": 1.0})
    assert started <= oldest.saved <= middle.saved <= time.time()
