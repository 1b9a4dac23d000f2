"""How a command ends: at once, and with nothing left undone."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import DINO, finish, spawn

from dino.exits import saying_interrupted


@pytest.mark.parametrize(
    ("last_line", "code", "words"),
    [
        ("pass", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(75)", 75, ""),
        ("raise SystemExit('a sentence')", 1, "a sentence"),
        ("raise RuntimeError('a fault')", 1, "RuntimeError: a fault"),
        ("sys.stdout.write('never seen'); os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", 120, "No space left"),
    ],
)
def test_threads_and_handlers_come_to_their_end_and_the_code_is_kept(last_line: str, code: int, words: str) -> None:
    lines = [
        "import atexit, os, sys, threading, time",
        "from dino.exits import leaving_at_once",
        "class Library:",
        "    def __del__(self, write=os.write): write(2, b'taken apart')",
        "library = Library()",
        "def later(): time.sleep(0.2); print('thread', file=sys.stderr)",
        "with leaving_at_once():",
        "    atexit.register(print, 'handler', file=sys.stderr)",
        "    threading.Thread(target=later).start()",
        f"    {last_line}",
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert words in done.stderr
    assert "thread\nhandler\n" in done.stderr
    assert ("taken apart" in done.stderr) == (words != ""), "only where Python has something to say itself"


@pytest.fixture
def heeded_ctrl_c() -> Iterator[None]:
    """What a shell starts in the background ignores it, and so would what the tests start from there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_ctrl_c")
def test_ctrl_c_ends_a_command_with_a_word(tmp_path: Path) -> None:
    process = spawn([DINO, "data", "bench", "--seconds", "60"], cwd=tmp_path)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("measuring")
    process.send_signal(signal.SIGINT)
    done = finish(process, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [(KeyboardInterrupt(), 130, "interrupted\n"), (SystemExit(130), 130, "interrupted\n"), (SystemExit(2), 2, "")],
)
def test_only_what_was_interrupted_says_so(
    ending: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop, saying_interrupted():
        raise ending
    assert stop.value.code == code
    assert capsys.readouterr().err == words
