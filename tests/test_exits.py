"""How a command ends: at once, and with nothing left undone."""

import os
import subprocess
import sys

import pytest


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
