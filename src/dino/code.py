"""Which code this is: its git commit, also in a copy that was made for a sweep. Imports no torch."""

import json
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECORD = ".code.json"  # in a copy: the commit that it was taken from


def git(*arguments: str, folder: Path = REPOSITORY) -> str:
    """What git prints. Raises `OSError` or `subprocess.SubprocessError` without git or outside of a repository."""
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def commit(folder: Path = REPOSITORY) -> str:
    """The git commit of the code in `folder`, with `+changes` where tracked files differ; `unknown` outside git."""
    if (folder / RECORD).is_file():
        recorded: str = json.loads((folder / RECORD).read_text())["commit"]
        return recorded
    try:
        changes = "+changes" if git("status", "--porcelain", "-uno", folder=folder) else ""
        return git("rev-parse", "HEAD", folder=folder) + changes
    except (OSError, subprocess.SubprocessError):
        return "unknown"
