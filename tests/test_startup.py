"""How soon a command answers: what is imported for help and for mistakes, and what is read from source in its place."""

import importlib
import inspect
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import DINO, REPOSITORY, finish, metrics, spawn, train

from dino.signatures import MissingNameError, read_parameters
from dino.start_up import OtherProcesses, StartUp
from dino.targets import ALLOWED_PREFIXES, type_mismatch

HEAVY = {"torch", "torchvision", "timm", "wandb", "sklearn", "scipy", "matplotlib", "pandas", "tensorboard"}
TRAIN = [str(REPOSITORY / "train.py")]


def imported(words: list[str], cwd: Path) -> tuple[int, set[str], str]:
    """Exit code, top-level packages that were imported, and what was printed as an error."""
    done = finish(spawn([sys.executable, *words], cwd=cwd, environment={"PYTHONPROFILEIMPORTTIME": "1"}))
    lines = done.stderr.splitlines()
    imports = {line.rpartition("|")[2].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    return done.returncode, imports, "\n".join(line for line in lines if not line.startswith("import time:"))


@pytest.mark.parametrize(
    "words",
    [
        [*TRAIN, "--help"],
        [*TRAIN, "--cfg", "job"],
        [str(REPOSITORY / "sweep.py"), "--help"],
        [DINO, "--help"],
        [DINO, "data", "--help"],
    ],
)
def test_help_imports_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    exit_code, imports, errors = imported(words, tmp_path)
    assert (exit_code, errors) == (0, "")
    assert "dino" in imports
    assert not imports & HEAVY


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["loss.teacher_tmp=1"], "did you mean loss.teacher_temp?"),
        (["trainer.epochs=0"], "use a whole number of at least 1"),
        (["backbone=vit_huge"], "no such option"),
        (["+ema.momentun=1"], "ema.momentun: dino.optimizer.EMA takes no momentun"),
        (["+optimizer.lrr=1"], "optimizer.lrr: torch.optim.AdamW takes no lrr; did you mean optimizer.lr?"),
        (["ema.buffers=share"], "ema.buffers=share: use own or copy or average"),
        (["loss._target_=dino.loss.DINOLos"], "dino.loss has no DINOLos; did you mean DINOLoss?"),
        (["-m", "seed=0,1", "+head.width=2"], "head.width: dino.model.DINOHead takes no width"),
    ],
)
def test_mistakes_are_answered_before_anything_heavy_is_imported(
    words: list[str], sentence: str, tmp_path: Path
) -> None:
    exit_code, imports, errors = imported([*TRAIN, *words], tmp_path)
    assert exit_code == 2
    assert sentence in errors
    assert len(errors.splitlines()) == 1
    assert not imports & HEAVY
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", [["data", "check"], ["data", "preview"], ["tune", "batch"]])
def test_so_they_are_by_the_other_commands(command: list[str], tmp_path: Path) -> None:
    exit_code, imports, errors = imported([DINO, *command, "+head.width=2"], tmp_path)
    assert exit_code == 2
    assert errors.startswith("error: head.width: dino.model.DINOHead takes no width")
    assert not imports & HEAVY


# ---------------------------------------------------------------------- signatures


TARGETS = sorted(
    {
        name
        for path in (REPOSITORY / "conf").rglob("*.yaml")
        for name in re.findall(r"_target_: ((?:dino|torch)\.\S+)", path.read_text())
    }
)
VALUES: list[Any] = [None, True, 3, 2.5, "x", "auto", [1.0], ["x"], [1, 2], [], {"a": 1}]


@pytest.mark.parametrize("name", TARGETS)
def test_the_source_of_every_target_tells_its_signature(name: str) -> None:
    module, _, last = name.rpartition(".")
    real = inspect.signature(getattr(importlib.import_module(module), last), eval_str=True).parameters
    read = read_parameters(name, ALLOWED_PREFIXES)
    assert read is not None
    assert list(read) == list(real)
    for parameter in real:
        ours, theirs = read[parameter], real[parameter]
        assert ours.kind == theirs.kind
        assert (ours.default is ours.empty) == (theirs.default is theirs.empty)
        for value in VALUES:
            assert type_mismatch(ours.annotation, value) == type_mismatch(theirs.annotation, value)


SOURCE = """
import functools
from abc import ABC
from dataclasses import InitVar, dataclass, field
from typing import ClassVar, Literal, NamedTuple, Optional

from made_up_package.other import Kind, Parent
from .other import *

@dataclass(kw_only=True)
class Data(Parent):
    kind: Kind = "a"
    table: "Optional[list[int]]" = field(default_factory=list)
    made: int = field(init=False)
    shared: ClassVar[int] = 3

@dataclass
class Derives(Data):
    last: float

class Plain(ABC):
    def __init__(self, first, /, second: int | None = None, *rest: str, third: unknown, **others: float) -> None: ...

class Inherits(Plain): ...

class Empty: ...

def function(number: int, *, flag: bool = False) -> None: ...

Alias = function

# From here on: what a reader of the source cannot be sure of.
@functools.cache
def decorated(number: int) -> None: ...

@dataclass
class After:
    number: InitVar[int]

class Row(NamedTuple):
    number: int

class Two(Data, Plain): ...

class Made:
    def __new__(cls, number: int) -> "Made": ...
"""


@pytest.fixture
def made_up_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made_up_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("from made_up_package.things import Plain\n\ndef own() -> None: ...\n")
    (folder / "things.py").write_text(SOURCE)
    (folder / "other.py").write_text(
        "from dataclasses import dataclass\nfrom typing import Literal\n"
        "Kind = Literal['a', 'b']\n\n@dataclass(kw_only=True)\nclass Parent:\n    size: int\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("dino.signatures._module", inspect.unwrap(__import__("dino.signatures").signatures._module))


def described(name: str) -> str | None:
    read = read_parameters.__wrapped__(f"made_up_package.{name}", ("made_up_package",))
    return None if read is None else str(inspect.Signature(list(read.values()), __validate_parameters__=False))


@pytest.mark.usefixtures("made_up_package")
def test_what_source_tells() -> None:
    data = "*, size: int, kind: Literal['a', 'b'] = Ellipsis, table: Optional[list[int]] = Ellipsis"
    plain = "first, /, second: int | None = Ellipsis, *rest: str, third: "
    assert described("things.Data") == f"({data})"
    assert described("things.Derives").replace("last: float, ", "").replace(", last: float", "") == f"({data})"
    for name in ("Plain", "things.Plain", "things.Inherits"):
        assert described(name).startswith(f"({plain}")
        assert described(name).endswith("**others: float)")
    assert described("things.Empty") == "()"
    assert described("things.function") == "(number: int, *, flag: bool = Ellipsis)"
    assert "made_up_package" not in sys.modules


@pytest.mark.usefixtures("made_up_package")
@pytest.mark.parametrize(
    "name", ["decorated", "After", "Row", "Two", "Made", "Alias", "Nothing", "functools.cache", "Data.kind"]
)
def test_what_source_does_not_tell_is_left_to_importing(name: str) -> None:
    assert described(f"things.{name}") is None


@pytest.mark.usefixtures("made_up_package")
def test_a_name_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(MissingNameError, match="made_up_package has no Nothing") as caught:
        described("Nothing")
    assert caught.value.options == ["Plain", "own"]


def test_other_packages_are_not_read() -> None:
    assert read_parameters("os.path.join", ALLOWED_PREFIXES) is None
    assert read_parameters("dino.config.os.system", ALLOWED_PREFIXES) is None


# ---------------------------------------------------------------------- the first step


def test_the_time_to_the_first_step_is_told_once_by_every_process(tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path}", "evaluation=[]", "monitor.every_steps=4", "resume_changes=[trainer]"]
    for last_step, logged_step in ((3, 1), (6, 4)):
        done = train(*words, f"trainer.max_steps={last_step}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("first step"))
        assert re.fullmatch(r"first step  done \d+\.\d s after the start \(settings \d.*imports \d.*\)", line)
        told = {line["step"]: line["perf/first_step_s"] for line in metrics(tmp_path) if "perf/first_step_s" in line}
        assert list(told)[-1] == logged_step
        seconds = float(re.search(r"done (\S+) s", line)[1])
        assert told[logged_step] == pytest.approx(seconds, abs=0.06)
        assert sum(map(float, re.findall(r"[a-z] (\d+\.\d)(?=[,)])", line))) == pytest.approx(seconds, abs=0.5)
    assert len(told) == 2


def test_a_second_run_in_a_process_counts_from_its_own_start() -> None:
    StartUp()
    second = StartUp()
    time.sleep(0.06)
    second.mark("imports")
    assert not second.done
    assert second.metrics() == {}
    second.mark("first step")
    assert 0.05 < second.metrics()["perf/first_step_s"] < 10
    assert second.metrics() == {}
    assert str(second).startswith("done 0.1 s after the start (imports 0.1")


def test_threads_that_lose_their_cores_to_other_processes_are_told(tmp_path: Path) -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        done = train("trainer.epochs=1", "trainer.num_threads=2", cwd=tmp_path)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert done.returncode == 0
    found = re.search(r"note        other processes keep ([\d.]+) of (\d+) cores busy, and 2 threads", done.stdout)
    assert found is not None
    assert float(found[1]) > 0.3 * float(found[2])  # our own work has the rest
    assert "trainer.num_threads=1 may be faster" in done.stdout


def test_work_of_children_is_not_that_of_others() -> None:
    others, before, started = OtherProcesses(), sum(os.times()[:4]), time.perf_counter()
    burn = "import time; end = time.perf_counter() + 1\nwhile time.perf_counter() < end: pass"
    children = [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(others.num_cores)]
    for child in children:
        child.wait()
    busy, seconds = others.busy_cores(), time.perf_counter() - started
    own = (sum(os.times()[:4]) - before) / seconds
    assert own > 0.1 * others.num_cores
    assert busy + own < others.num_cores + 0.3
