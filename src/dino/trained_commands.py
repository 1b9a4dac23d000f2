"""Commands of `dino` that use what was learned, of any run, checkpoint or weight file, and look at runs and machine."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from dino.trained import Trained

COLUMN_WIDTH, MIN_WIDTH = 12, 8  # letters that a column of the table of runs should have, and has
MIN_COLUMNS = 6  # of it, however narrow the terminal is

Weights = Annotated[
    Path,
    typer.Argument(
        help="a run directory, a checkpoint, an export, or weights of the original, timm, torchvision or Hugging Face"
    ),
]
Checkpoint = Annotated[str, typer.Option(help="of a run: last, best or the number of a step")]
Network = Annotated[str, typer.Option(help="teacher or student, where there are both")]
BackboneName = Annotated[
    str | None, typer.Option("--backbone", help="for files that do not tell: an option of conf/backbone, or timm/NAME")
]


def _loaded(weights: Path, network: str, checkpoint: str, backbone: str | None) -> "Trained":
    """The backbone, after a line that says what was loaded."""
    from dino.trained import load_trained

    trained = load_trained(weights, network=network, checkpoint=checkpoint, backbone=backbone)
    typer.echo(str(trained.report))
    return trained


def evaluate(
    weights: Weights,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dataset=NAME, dataset.root=PATH, evaluation.knn.neighbours=[10,20] ...")
    ] = None,
    protocol: Annotated[str, typer.Option(help="options of conf/evaluation, with commas between")] = "knn",
    checkpoint: Checkpoint = "last",
    network: Network = "teacher",
    backbone: BackboneName = None,
) -> None:
    """What features are worth: k-NN, linear probe, rank, retrieval, copy detection, video segmentation."""
    from dino.evaluation.command import evaluate_trained
    from dino.processes import Processes

    with _answering():
        if not Processes.from_environment().is_main:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  rank 0 says it, for as long as this process lives
        _show_log()
        trained = _loaded(weights, network, checkpoint, backbone)
        places = (weights, weights.resolve().parent.parent)  # a checkpoint that lies in its run belongs to it
        of_run = (place for place in places if trained.run_settings and (place / "config.yaml").is_file())
        run = next(of_run, None)
        if run is None and (weights / "checkpoints").is_dir():
            raise ValueError(
                f"{weights}/config.yaml is gone, which says on which images: name a checkpoint in it, and dataset=NAME"
            )
        names = [name.strip() for name in protocol.split(",")]
        evaluation = evaluate_trained(trained, run, names, overrides or [])
    if not evaluation.is_main:
        return
    title = f"{evaluation.dataset}, {trained.network}" + (f", step {trained.step}" if trained.step is not None else "")
    table = Table(Column("metric"), Column("value", justify="right"), title=title)
    for name, value in evaluation.metrics.items():
        table.add_row(name, f"{value:.4g}")
    for name, value in evaluation.seconds.items():
        table.add_row(f"{name}, time", f"{value:.1f} s")
    Console().print(table)
    if evaluation.path is not None and not evaluation.is_lost:
        typer.echo(f"results: {evaluation.path}")
    if run is None:
        typer.echo("these weights lie in no run: the results are kept nowhere")
    if not evaluation.metrics or evaluation.is_lost:
        raise typer.Exit(1)


def attend(
    weights: Weights,
    image: Annotated[Path, typer.Option(help="an image, a folder of images, or a video")],
    output: Annotated[
        Path | None, typer.Option(help="the folder that is written; attention, or attention_untrained")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="also masks of the patches that hold this share of a head's attention")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="short side of the image [pixels]; twice that of training")
    ] = None,
    match: Annotated[Path | None, typer.Option(help="a second image: patches that correspond are joined")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="of a video, at most so many")] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="the same network with fresh random weights")] = False,
    checkpoint: Checkpoint = "last",
    network: Network = "teacher",
    backbone: BackboneName = None,
) -> None:
    """Pictures of what a ViT looks at: attention of every head, masks, patches as colours; and one page with them."""
    from dino.evaluation.attend import VIDEO_SUFFIXES, Onlooker, attend_images, write_video
    from dino.runtime import choose_device

    with _answering():
        trained = _loaded(weights, network, checkpoint, backbone)
        if untrained:
            trained = trained.untrained()
            typer.echo("these weights are left aside: the network is freshly initialised")
        output = output or Path("attention_untrained" if untrained else "attention")
        onlooker = Onlooker(trained, size or 2 * trained.preparation.size, choose_device("auto"))
        if image.suffix.lower() in VIDEO_SUFFIXES and image.is_file():
            if threshold is not None or match is not None:
                raise ValueError("--threshold and --match are for images; a video shows the mean attention")
            path = output / f"{image.stem}_attention.mp4"
            typer.echo(f"{path}: {write_video(onlooker, image, path, max_frames)} frames")
            return
        page = attend_images(onlooker, image, output, threshold=threshold, match=match)
    typer.echo(f"{page}: all pictures, which lie in {output}")


def export(
    weights: Weights,
    formats: Annotated[
        str, typer.Option("--format", help="safetensors, original, timm, huggingface, onnx, with commas between")
    ] = "safetensors",
    output: Annotated[Path | None, typer.Option(help="the folder that is written; export/ of a run")] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="of the images [pixels]: 224, or 224x320; also several times; of training")
    ] = None,
    checkpoint: Checkpoint = "last",
    network: Network = "teacher",
    backbone: BackboneName = None,
) -> None:
    """The backbone for other tools; each file is read back by its library, and the largest difference is told."""
    from dino.export import export as write

    with _answering():
        trained = _loaded(weights, network, checkpoint, backbone)
        folder = output or (weights / "export" if (weights / "checkpoints").is_dir() else Path("export"))
        sizes = [_size(word) for word in size or ()]
        done = write(trained, [name.strip() for name in formats.split(",")], folder, sizes)
    for each in done:
        verdict, pixels = "equal" if each.equal else "NOT EQUAL", " x ".join(map(str, each.image_size))
        typer.echo(
            f"{each.path}: {verdict} at {pixels} pixels, largest difference {each.largest_difference:.2g} "
            f"of {each.largest_feature:.2g} ({each.reader})\n    {each.usage}"
        )
    if not all(each.equal for each in done):
        raise typer.Exit(1)


def _show_log() -> None:
    """What evaluators have to say, such as why something cannot be measured, is printed."""
    log, handler = logging.getLogger("dino"), logging.StreamHandler(sys.stdout)
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def _size(word: str) -> tuple[int, int]:
    """`224`, or `224x320`: height and width."""
    height, _, width = word.partition("x")
    if not height.isdecimal() or not (width or height).isdecimal():
        raise ValueError(f"--size {word}: use a number of pixels, or HEIGHTxWIDTH, such as 224 or 224x320")
    return int(height), int(width or height)


def results(
    folder: Annotated[Path, typer.Argument(help="a folder with runs below it")] = Path("outputs"),
    sort: Annotated[str | None, typer.Option(help="a column; metrics begin with the better end")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="a metric to show; may be given several times")] = None,
    csv: Annotated[Path | None, typer.Option(help="a file for the whole table")] = None,
) -> None:
    """One table over all runs below a folder: state, time, the settings in which they differ, and metrics."""
    from dino.analysis.results import collect_results

    with _answering():
        found = collect_results(folder, metric or (), sort)
    console, title = Console(), Text(f"{len(found.rows)} runs in {folder}")
    columns = found.abridged(max(MIN_COLUMNS, console.width // COLUMN_WIDTH))
    table = Table(*(Column(Text(name), overflow="fold", min_width=MIN_WIDTH) for name in columns), title=title)
    for row in found.rows:
        values = [row.get(name) for name in columns]
        table.add_row(*(Text("" if value is None else _words(value)) for value in values))
    console.print(table)
    if left := len(found.columns) - len(columns):
        typer.echo(f"columns that are left out here: {left}; a wider terminal shows more, --csv FILE has all of them")
    if csv is not None:
        with _answering():
            found.write_csv(csv)
        typer.echo(f"{csv}: the whole table")


def _words(value: Any) -> str:
    from dino.messages import show

    return f"{value:.4g}" if isinstance(value, float) else show(value)


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Bad values, and a disk that refuses, are one sentence each."""
    from dino.launch import answering_bad_values

    try:
        with answering_bad_values():
            yield
    except OSError as error:
        typer.echo(f"error: {error.filename or 'a file'}: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None


def doctor(
    overrides: Annotated[list[str] | None, typer.Argument(help="of the run in question, as of train.py")] = None,
) -> None:
    """Versions, devices, cores, disk, Slurm, trackers and data: what is wrong, and how to mend it."""
    from dino.config import compose
    from dino.doctor import examine
    from dino.launch import answering_bad_values

    styles = {"good": "green", "note": "yellow", "wrong": "bold red"}
    table = Table(Column(), Column(), Column(overflow="fold"), show_header=False)
    with answering_bad_values():
        findings = list(examine(compose(overrides or [])))
    for finding in findings:
        words = finding.found + (f"\n-> {finding.advice}" if finding.advice else "")
        table.add_row(Text(finding.verdict, style=styles[finding.verdict]), finding.subject, Text(words))
    Console().print(table)
    num_wrong = sum(finding.verdict == "wrong" for finding in findings)
    typer.echo("nothing is wrong" if num_wrong == 0 else f"wrong: {num_wrong}")
    if num_wrong:
        raise typer.Exit(1)
