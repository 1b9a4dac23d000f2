"""What is fast learns what is plain: whole runs at the command line."""

import statistics
import sys
from pathlib import Path

import pytest
from command_line import REPOSITORY, metrics, run


@pytest.mark.slow
def test_digits_are_learned_as_well_as_by_the_plain_loss(tmp_path: Path) -> None:
    """k-NN after 200 steps of the quickstart, five seeds each: the means are within the noise of their difference."""
    accuracies: dict[str, list[float]] = {}
    for implementation in ("plain", "auto"):
        for seed in range(5):
            directory = tmp_path / f"{implementation}_{seed}"
            settings = [f"loss.implementation={implementation}", f"seed={seed}", f"run_dir={directory}"]
            shortened = ["trainer.max_steps=200", "monitor.report=false", "evaluation=knn"]
            done = run([sys.executable, str(REPOSITORY / "train.py"), *settings, *shortened], cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            found = [line["val/knn_top1"] for line in metrics(directory) if "val/knn_top1" in line]
            accuracies.setdefault(implementation, []).append(found[-1])
    means = {name: statistics.mean(values) for name, values in accuracies.items()}
    noise = sum(statistics.variance(values) / 5 for values in accuracies.values()) ** 0.5
    assert abs(means["plain"] - means["auto"]) <= max(2 * noise, 0.005), accuracies
