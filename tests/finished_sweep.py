"""Sweeps on disk for the tests of what is collected: real small trainings, and trials made by hand beside them."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from command_line import REPOSITORY, TINY, metrics, run

from dino.messages import show
from dino.run import read_status
from dino.sweep.manifest import Manifest, Snapshot, Submission, Trial
from dino.sweep.states import TrialState

BASE = [
    *TINY,
    "evaluation=[knn,label_free]",
    "evaluation.knn.every_epochs=1",
    "evaluation.label_free.every_epochs=1",
    "optimizer.lr=0.05",
]
AXES = {"loss.teacher_temp": [0.02, 0.04], "ema.momentum": [0.9, 0.996]}
SEEDS = (1, 2)  # not the default, so that a command without its seed is another run
REASON = "ValueError: [b]head[/b] <b>no</b> & </script><script>throw new Error('escaped badly')</script>"
TRACEBACK = "src/dino/model/head.py:12: ValueError: <b>no</b>"


def new_manifest(folder: Path, **changes: Any) -> Manifest:
    """An empty sweep in a new folder."""
    folder.mkdir(parents=True)
    sweep = {"metric": "val/knn_top1", "direction": "maximize"} | changes
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    return Manifest(
        folder=folder,
        name=folder.name,
        created=0.0,
        command=["python", "sweep.py", "submit", "sweep=<test>"],
        cwd=str(folder.parent),
        base=BASE,
        sweep=sweep,
        cluster={"_target_": "dino.sweep.local.Local"},
        snapshots=[Snapshot("code", "5eed" * 16, commit or "unknown", str(REPOSITORY))],
    )


def add_trial(manifest: Manifest, settings: Mapping[str, Any], seed: int) -> Trial:
    """Planned and submitted; nothing of it is on disk yet."""
    number = len(manifest.trials)
    words = [f"{key}={show(value)}" for key, value in settings.items()]
    trial = Trial(
        id=f"{number:03}_{number:08x}",
        fingerprint=f"{number:08x}" * 8,
        settings=dict(settings),
        seed=seed,
        overrides=[*manifest.base, *words, f"seed={seed}"],
    )
    manifest.trials.append(trial)
    manifest.submissions.append(Submission(id=f"s{number}", time=0.0, trials=[trial.id], snapshot=0))
    return trial


def add_by_hand(manifest: Manifest, settings: Mapping[str, Any], seed: int, lines: Sequence[dict[str, Any]]) -> Trial:
    """A trial that has logged these lines; a `null` is a value that was not finite."""
    trial = add_trial(manifest, settings, seed)
    manifest.directory(trial).mkdir()
    text = "".join(json.dumps({"epoch": 0.0, "time": 0.0, **line}) + "\n" for line in lines)
    (manifest.directory(trial) / "metrics.jsonl").write_text(text)
    return trial


def state_of(manifest: Manifest, trial: Trial, state: str, **changes: Any) -> TrialState:
    status = read_status(manifest.directory(trial))
    steps = {"step": status.get("step"), "total_steps": status.get("total_steps"), "host": status.get("host")}
    return TrialState(trial=trial, directory=manifest.directory(trial), state=state, **(steps | changes))


def real_sweep(folder: Path) -> tuple[Manifest, dict[str, TrialState]]:
    """2 x 2 settings with 2 seeds that have finished, and 2 settings of which nothing has.

    Of these, one trial has failed in the middle of writing a line, one has no number, one runs and one waits. The
    trainings are done once for a `folder`.
    """
    manifest = Manifest.read(folder) if folder.exists() else _trained(folder)
    ends = [
        {"state": "failed", "step": 3, "reason": REASON, "traceback": TRACEBACK, "exit_code": 1},
        {"state": "NaN", "step": 2, "reason": "2 steps in a row were not finite", "exit_code": 3},
        {"state": "running", "step": 3, "host": "node<1>"},
        {"state": "pending", "reason": "Resources"},
    ]
    finished = [{"state": "finished"}] * (len(manifest.trials) - len(ends))
    states = [state_of(manifest, t, **end) for t, end in zip(manifest.trials, [*finished, *ends], strict=True)]
    return manifest, {state.trial.id: state for state in states}


def _trained(folder: Path) -> Manifest:
    manifest = new_manifest(folder)
    (temp, temps), (momentum, momenta) = AXES.items()
    swept = [f"{key}={','.join(map(str, values))}" for key, values in AXES.items()]
    words = [
        "-m",
        *BASE,
        *swept,
        f"seed={SEEDS[0]},{SEEDS[1]}",
        f"hydra.sweep.dir={folder}/hydra",
    ]  # numbered, the last axis fastest
    process = run([sys.executable, str(REPOSITORY / "train.py"), *words], cwd=folder)
    assert process.returncode == 0, process.stderr
    for settings in [{temp: a, momentum: b} for a in temps for b in momenta]:
        for seed in SEEDS:
            trial = add_trial(manifest, settings, seed)
            (folder / "hydra" / str(len(manifest.trials) - 1)).rename(manifest.directory(trial))
    lines = metrics(manifest.directory(manifest.trials[0]))
    failed = add_by_hand(manifest, {temp: 0.07, momentum: 0.9}, SEEDS[0], lines[:4])
    with (manifest.directory(failed) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "epo')
    null = dict.fromkeys(lines[3])
    add_by_hand(
        manifest, {temp: 0.07, momentum: 0.9}, SEEDS[1], [*lines[:3], null | {"step": 2, "epoch": 1.0, "time": 0.0}]
    )
    add_by_hand(manifest, {temp: 0.07, momentum: 0.996}, SEEDS[0], lines[:5])
    add_trial(manifest, {temp: 0.07, momentum: 0.996}, SEEDS[1])
    manifest.write()
    return manifest
