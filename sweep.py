"""Plans, submits, watches, resumes and collects sweeps. `submit` returns at once; the others read files, from anywhere.

python sweep.py submit loss.teacher_temp=0.02,0.04 ema.momentum=0.99,0.996   four trials on this machine
python sweep.py submit sweep=temperature_momentum cluster=slurm              27 trials as arrays of Slurm jobs
python sweep.py status --watch                                               of the newest sweep, or of a folder
python sweep.py collect outputs/sweeps/NAME                                  table, CSV, JSON, sweep.html
"""

from pathlib import Path
from typing import Annotated

import typer

from dino.exits import saying_interrupted
from dino.launch import answering_bad_values
from dino.sweep import commands

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__.splitlines()[0], rich_markup_mode=None)

Sweep = Annotated[Path | None, typer.Argument(help="the sweep's folder; default: the newest of outputs/sweeps")]
Trials = Annotated[list[str] | None, typer.Argument(help="ids or numbers of trials; default: all")]


@app.command()
def submit(
    overrides: Annotated[list[str] | None, typer.Argument(help="sweep=..., cluster=..., key=value, key=a,b,c")] = None,
    dry_run: Annotated[bool, typer.Option(help="freeze all trials and print the scripts, but submit nothing")] = False,
) -> None:
    """Checks and freezes every trial with a copy of the code, hands all of them to the cluster, and returns."""
    commands.submit(overrides or [], dry_run=dry_run)


@app.command()
def status(
    sweep: Sweep = None,
    watch: Annotated[bool, typer.Option(help="again every two seconds, until all have ended")] = False,
) -> None:
    """Shows what has become of each trial."""
    commands.status(commands.find(sweep), watch=watch)


@app.command()
def logs(
    sweep: Sweep = None,
    trials: Trials = None,
    lines: Annotated[int, typer.Option("-n", min=1, help="how many lines of each log")] = 10,
    follow: Annotated[bool, typer.Option("-f", help="go on with what one trial writes")] = False,
) -> None:
    """Shows the end of the logs."""
    commands.logs(commands.find(sweep), trials or [], num_lines=lines, follow=follow)


@app.command()
def cancel(sweep: Sweep = None, trials: Trials = None) -> None:
    """Stops trials that wait or run; `resume` goes on from where they were."""
    commands.cancel(commands.find(sweep), trials or [])


@app.command()
def resume(
    sweep: Sweep = None,
    trials: Trials = None,
    code: Annotated[commands.Code, typer.Option(help="auto: current for trials that failed")] = commands.Code.AUTO,
) -> None:
    """Runs what is missing, was stopped or failed, as often as wanted; what is finished or under way is left alone."""
    commands.resume(commands.find(sweep), trials or [], code)


@app.command()
def collect(sweep: Sweep = None) -> None:
    """Writes results.csv, results.json and sweep.html; exit code 0: all finished, 1: some did not, 75: wait."""
    raise typer.Exit(commands.collect(commands.find(sweep)))


if __name__ == "__main__":
    with saying_interrupted(), answering_bad_values():
        app()
