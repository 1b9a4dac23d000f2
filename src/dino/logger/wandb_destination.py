"""Weights & Biases, in the process of the mirror."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import wandb
from omegaconf import OmegaConf

MIN_FREE_BYTES = 2**18


class WandbDestination:
    """A run of wandb whose files lie in `<run_dir>/wandb`; with the same id it goes on after a resume.

    Rows carry `step` as a value, over which all curves are drawn: wandb's own step would refuse what comes late.

    Args:
        settings: `id`, and the keys of conf/logger/wandb.yaml.
    """

    def __init__(self, run_dir: Path, settings: dict[str, Any]) -> None:
        config = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
        assert isinstance(config, dict)
        self._folder = run_dir / "wandb"
        self._run = wandb.init(
            id=settings["id"],
            resume="allow",
            mode=settings["mode"],
            project=settings["project"],
            entity=settings["entity"],
            name=settings["name"] or run_dir.name,
            group=settings["group"],
            tags=[*tags(run_dir, config), *settings["tags"]],
            dir=run_dir,
            config={str(key): value for key, value in config.items()},
            allow_val_change=True,
            settings=wandb.Settings(
                init_timeout=600,  # [s]: nobody waits, and a server may be asked by many runs at once
                console="off",
                silent=True,
                save_code=False,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_stats=True,
                x_save_requirements=False,
                x_transaction_log_flush_interval=1.0,
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def metrics(self, line: dict[str, Any]) -> None:
        self._run.log({("_timestamp" if name == "time" else name): value for name, value in line.items()})

    def event(self, line: dict[str, Any]) -> None:
        row = {"step": line["step"], "epoch": line["epoch"], "_timestamp": line["time"]}
        if line["event"] == "verdict":
            level = "ERROR" if line["severe"] else "WARN"
            self._run.alert(title=line["verdict"], text=line["text"], level=level, wait_duration=0)
            row[f"health/{line['verdict']}"] = line["count"]
        self._run.log({**row, f"events/{line['event']}": line["text"]})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({"step": step, f"pictures/{name}": wandb.Image(str(path))})

    def report(self, step: int, path: Path) -> None:
        self._run.log({"step": step, "report": wandb.Html(path.read_text(), inject=False)})

    def flush(self) -> None:
        """wandb sends by itself, and drops without a word what its disk has no room for.

        Raises:
            OSError: there is no room.
        """
        free = shutil.disk_usage(self._folder).free
        if free < MIN_FREE_BYTES:
            raise OSError(f"{free} bytes are free at {self._folder}, not enough for wandb")

    def close(self) -> None:
        self._run.finish()


def tags(run_dir: Path, config: dict[Any, Any]) -> list[str]:
    """Names of backbone and dataset: the option of the group where Hydra has noted it, else the network's own name."""
    backbone = config["backbone"]
    name = backbone.get("architecture") or backbone["_target_"].rpartition(".")[2]
    with contextlib.suppress(FileNotFoundError):
        hydra = OmegaConf.load(run_dir / ".hydra" / "hydra.yaml")
        name = OmegaConf.select(hydra, "hydra.runtime.choices.backbone") or name
    return [str(name), str(config["dataset"]["name"])]
