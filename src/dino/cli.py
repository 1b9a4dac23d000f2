"""The `dino` command: data, views, the loss and checkpoints of runs, and what can be done with what was learned.

Arguments are overrides, as of train.py, where a command composes a config.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Column, Table

from dino import trained_commands
from dino.exits import leaving_at_once, saying_interrupted

if TYPE_CHECKING:
    from dino.augmentation import ViewBatch
    from dino.runtime import Precision

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Data, views, loss and checkpoints of runs; what was learned, measured, looked at and exported.",
)
data = typer.Typer(no_args_is_help=True, help="What is learned from.")
debug = typer.Typer(no_args_is_help=True, help="What happens inside a step.")
tune = typer.Typer(no_args_is_help=True, help="Settings that suit the machine.")
app.command()(trained_commands.evaluate)
app.command()(trained_commands.attend)
app.command()(trained_commands.export)
app.command()(trained_commands.results)
app.command()(trained_commands.doctor)
app.add_typer(data, name="data")
app.add_typer(debug, name="debug")
app.add_typer(tune, name="tune")

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value and group=option, as of train.py")]


def _config(overrides: list[str] | None) -> DictConfig:
    """The checked config, or an exit with code 2 and one sentence a problem."""
    from dino.launch import exit_with
    from dino.messages import ConfigError
    from dino.validation import checked

    try:
        config, warnings = checked(overrides or [])
    except ConfigError as error:
        exit_with(error.problems)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    return config


@app.command("checkpoints")
def list_checkpoints(run: Annotated[Path, typer.Argument(help="the directory of a run")]) -> None:
    """The checkpoints of a run, newest first: step, date, size, whether they are valid, and what was measured."""
    from dino.checkpoint_files import entries, find_folder, sidecars_alone, table
    from dino.launch import answering_bad_values

    with answering_bad_values():
        folder = find_folder(run)
        found = entries(folder)
    for line in table(found):
        typer.echo(line)
    if not any(entry.valid for entry in found):
        num_alone = len(sidecars_alone(folder))
        lost = f"; sidecars (step_*.json) whose file is gone: {num_alone}" if num_alone else ""
        typer.echo(f"there is no valid checkpoint{lost}", err=True)
        raise typer.Exit(1)


@app.command("report")
def report_runs(
    runs: Annotated[list[Path], typer.Argument(help="the directories of one or several runs")],
    output: Annotated[Path | None, typer.Option(help="the page that is written; report.html of the first run")] = None,
) -> None:
    """Whether runs learn, what is wrong and what to change; writes report.html, and plots/ of each run."""
    from dino.analysis import History, analyse
    from dino.analysis.history import labels
    from dino.analysis.report import write
    from dino.analysis.terminal import terminal_report
    from dino.launch import answering_bad_values

    with answering_bad_values():
        analyses = [analyse(History.load(run)) for run in runs]
    for analysis, name in zip(analyses, labels([analysis.history for analysis in analyses]), strict=True):
        Console().print(terminal_report(analysis, name))
    try:
        path = write(analyses, output)
    except OSError as error:
        typer.echo(f"the report cannot be written: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"report: {path}")


@data.command("check")
def data_check(overrides: Overrides = None) -> None:
    """Counts, sizes, modes, unreadable files, exact duplicates and steps per epoch of a dataset."""
    config = _config(overrides)  # before torch is imported
    from dino.config import build
    from dino.dataset import check
    from dino.launch import answering_bad_values

    with answering_bad_values():
        dataset = build(config, "dataset")
        report = check(dataset, dataset.batch_size * config.trainer.accumulate_steps)
    table = Table(Column(), Column(overflow="fold"), show_header=False, title=dataset.name)  # paths are never cut
    for row in report.rows():
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
    if report.num_unreadable or report.steps_per_epoch == 0:
        raise typer.Exit(1)


@data.command("bench")
def data_bench(
    overrides: Overrides = None,
    step: Annotated[bool, typer.Option("--step", help="also time training steps of this config")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object in place of the table")] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="how long each part is measured [s]")] = 1.0,
) -> None:
    """Images/s of every stage from file to step, of the loader by its workers, and how many workers to use."""
    import json

    from dino.config import build
    from dino.dataset import bench
    from dino.dataset.sampler import steps_per_epoch
    from dino.launch import answering_bad_values
    from dino.training.assemble import prepare_process

    config = _config(overrides)
    with answering_bad_values():
        precision = prepare_process(build(config, "trainer"))
        dataset = build(config, "dataset")
        num_batches = steps_per_epoch(len(dataset.train()), dataset.batch_size)  # refuses what is too large a batch
        mean, std = dataset.normalization()
        augmentation = build(config, "augmentation", mean=mean, std=std)
        train_step = _training_step(config, precision, num_batches) if step else None
        report = bench(
            dataset,
            augmentation,
            precision.device,
            seed=config.seed,
            seconds=seconds,
            step=train_step,
            tell=lambda what: typer.echo(f"measuring   {what}", err=True),
        )
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
        return
    table = Table(Column(), Column(overflow="fold"), show_header=False, title=f"{dataset.name}: views for training")
    for row in report.rows():
        table.add_row(*row)
    Console().print(table)


def _training_step(config: DictConfig, precision: "Precision", steps_per_epoch: int) -> "Callable[[ViewBatch], object]":
    """A step of a freshly initialised run, numbered from 0 again and again."""
    from dino.config import build
    from dino.runtime import set_seeds
    from dino.training.assemble import build_step

    options, batch_size = build(config, "trainer"), config.dataset.batch_size
    set_seeds(config.seed)
    step = build_step(config, options, precision, steps_per_epoch, batch_size)
    return lambda views: step(0, [views])


@data.command("preview")
def data_preview(
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="the picture that is written")] = Path("views.png"),
    num_images: Annotated[int, typer.Option(min=1, help="how many images, one a row")] = 8,
) -> None:
    """A picture of the views of some images, as the student sees them in the first epoch."""
    config = _config(overrides)  # before torch is imported
    from dino.augmentation import preview
    from dino.config import build
    from dino.dataset import ShuffledSampler
    from dino.launch import answering_bad_values

    with answering_bad_values():
        dataset = build(config, "dataset")
        mean, std = dataset.normalization()
        augmentation = build(config, "augmentation", mean=mean, std=std)
        source = dataset.train()
        sampler = ShuffledSampler(len(source), min(num_images, len(source)), config.seed)
        views = augmentation(source, next(iter(sampler.batches(0))), seed=config.seed, epoch=0)
        preview(augmentation.photometric(views), output, mean, std)
    typer.echo(f"{output}: {len(views.indices)} images of {dataset.name}, one a row; global views first")


@debug.command("loss")
def debug_loss(
    run_or_overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="a run directory, a config.yaml or nothing; then key=value and group=option, as of train.py"
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="the picture of the distributions that is written")] = Path("loss.png"),
) -> None:
    """One batch through student, teacher and loss: every intermediate, and whether what must hold does.

    Of a run: its newest checkpoint. Otherwise the networks are freshly initialised. The exit code is 1 where a check
    fails.
    """
    from dino.debug import inspect_loss, is_path, lines_of, subject_of, subject_of_path, write_figure
    from dino.launch import answering_bad_values

    words = run_or_overrides or []
    with answering_bad_values():
        if words and is_path(words[0]):
            subject = subject_of_path(Path(words[0]), words[1:])
        else:
            subject = subject_of(_config(words))
        inspection = inspect_loss(subject)
    for line in lines_of(inspection):
        typer.echo(line)
    write_figure(inspection, output)
    typer.echo(f"{output}: entropy, largest probability, concentration and agreement of student and teacher")
    if not inspection.sound:
        raise typer.Exit(1)


@tune.command("batch")
def tune_batch_command(
    overrides: Overrides = None,
    memory_gib: Annotated[
        float | None, typer.Option(min=0.1, help="what a run may take [GiB]; default: what is free now, less headroom")
    ] = None,
    headroom: Annotated[float, typer.Option(min=0.0, max=0.9, help="share of the free memory that stays free")] = 0.1,
    multiple: Annotated[int, typer.Option(min=1, help="batch sizes are multiples of this")] = 8,
    max_batch: Annotated[int, typer.Option(min=1, help="no larger batch is tried")] = 4096,
) -> None:
    """The largest dataset.batch_size that fits into memory, by real runs of a few steps, each a process of its own.

    On a CPU this is the memory of the training process; the workers of the loader come on top.
    """
    config = _config(overrides)  # before torch is imported
    from dino.launch import answering_bad_values
    from dino.training.tune import Trial, tune_batch

    def say(trial: Trial) -> None:
        peak = "out of memory" if trial.peak_gib is None else f"{trial.peak_gib:.2f} GiB"
        typer.echo(f"batch {trial.batch_size}: {peak}", err=True)

    with answering_bad_values():
        found = tune_batch(
            config,
            overrides or [],
            memory_gib=memory_gib,
            headroom=headroom,
            multiple=multiple,
            max_batch=max_batch,
            say=say,
        )
    Console().print(found.table())
    for line in found.advice():
        typer.echo(line)
    if found.largest is None:
        raise typer.Exit(1)


def main() -> None:
    """The command `dino`."""
    with saying_interrupted(), leaving_at_once():
        app()
