"""A sweep whose trials run a program of the test in place of train.py: what a supervisor does shows within a second."""

import json
import time
from pathlib import Path
from typing import Any

from dino.run import write_json
from dino.sweep.attempts import Attempt, End, Start, read_attempts
from dino.sweep.manifest import Manifest, Snapshot, Submission, Trial
from dino.sweep.snapshot import digest

# What every such program begins with: `directory` of the trial, `attempt` (1, 2, ...), and `status(...)`.
PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path

directory = Path(sys.argv[sys.argv.index("--frozen") + 1]).parent
rank = int(os.environ.get("SLURM_PROCID", 0))
with open(directory / f"begun_{rank}", "a") as file:
    file.write(json.dumps(dict(os.environ)) + "\\n")
attempt = len((directory / f"begun_{rank}").read_text().splitlines())

def status(state, step):
    if rank: return
    path = directory / "status.json"
    path.with_suffix(".new").write_text(json.dumps({"state": state, "step": step}))
    path.with_suffix(".new").rename(path)

def when_asked(action):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: action(signal.Signals(number).name))

def preempted(name="", step=1):
    status("preempted", step)
    sys.exit(75)
"""
FINISHES = 'status("finished", 9)\n'
WAITS = "when_asked(preempted)\nstatus('running', 1)\ntime.sleep(300)\n"


def handmade_sweep(folder: Path, program: str, count: int = 1, **settings: Any) -> Manifest:
    """`settings`: `sweep` and `cluster` of the manifest. Nothing is submitted."""
    code = folder / "code"
    code.mkdir(parents=True)
    (code / "train.py").write_text(PRELUDE + program)
    (folder / "jobs").mkdir()
    manifest = Manifest(
        folder=folder,
        name="handmade",
        created=time.time(),
        command=[],
        cwd=str(folder),
        base=[],
        sweep=settings.get("sweep", {}),
        cluster=settings.get("cluster", {}),
        snapshots=[Snapshot("code", digest(code), "unknown", str(folder / "source"))],
        trials=[Trial(f"{number:03}_0badcafe", f"{number:016}", {}, 0, []) for number in range(count)],
    )
    for trial in manifest.trials:
        manifest.directory(trial).mkdir()
    manifest.write()
    return manifest


def submitted(manifest: Manifest) -> str:
    """The id of a submission of all trials that no cluster knows of."""
    submission = Submission(f"handmade{len(manifest.submissions)}", time.time(), [t.id for t in manifest.trials], 0)
    manifest.submissions.append(submission)
    manifest.write()
    return submission.id


def attempts(manifest: Manifest, number: int = 0) -> list[Attempt]:
    return list(read_attempts(manifest.directory(manifest.trials[number])))


def starts(manifest: Manifest, number: int = 0) -> list[Start]:
    return [attempt for attempt in attempts(manifest, number) if isinstance(attempt, Start)]


def ends(manifest: Manifest, number: int = 0) -> list[End]:
    return [attempt for attempt in attempts(manifest, number) if isinstance(attempt, End)]


def environments(manifest: Manifest, number: int = 0, rank: int = 0) -> list[dict[str, str]]:
    """What the program found in its environment, once for each time that it was started."""
    path = manifest.directory(manifest.trials[number]) / f"begun_{rank}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def set_state(manifest: Manifest, number: int, state: str) -> None:
    write_json(manifest.directory(manifest.trials[number]) / "status.json", {"state": state, "step": 9})
