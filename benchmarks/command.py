"""The command line of `run.py`."""

import argparse
import importlib
import sys
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks.harness import Unavailable
from benchmarks.options import Options

# In the order in which they run.
BENCHMARKS = (
    "step",
    "layers",
    "loss",
    "head_loss",
    "update",
    "views",
    "startup",
    "resume",
    "profiling",
    "growth",
    "time_to_accuracy",
)


def main() -> None:
    arguments = _arguments()
    from benchmarks import machine, results  # here: they take seconds

    folder = results.FOLDER
    if arguments.quick:
        folder = Path(tempfile.mkdtemp(prefix="quick_results_"))
    if arguments.page:
        print(results.write_page(folder))
        return
    options = Options(
        quick=arguments.quick,
        rounds=arguments.rounds,
        device=arguments.device,
        images=arguments.images,
        data=arguments.data,
        epochs=arguments.epochs,
        seeds=arguments.seeds,
    )
    described = machine.describe(options.device)
    started = time.perf_counter()
    failed = [name for name in arguments.names or BENCHMARKS if not _measure(name, options, described, folder)]
    print(f"all: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    print(results.write_page(folder))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _measure(name: str, options: Options, described: dict[str, object], folder: Path) -> bool:
    """Runs one benchmark and writes its result; false where it failed, and the others go on."""
    from benchmarks import machine, results

    started = time.perf_counter()
    benchmark = importlib.import_module(f"benchmarks.{name}")
    measured = []
    try:
        for one in benchmark.measure(options):
            measured.append(one)
            print("\n".join(["", *results.shown(one)]), flush=True)  # the next may take many minutes
    except Unavailable as reason:
        print(f"{name}: left out: {reason}", file=sys.stderr)
        return True
    except Exception:
        traceback.print_exc()
        return False
    results.save(name, benchmark.__doc__.strip(), measured, described, folder / machine.folder_name(options.device))
    print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return True


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures this project beside a textbook implementation and lightly.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether everything runs")
    parser.add_argument("--page", action="store_true", help="only write the page and plots anew")
    parser.add_argument("--rounds", type=int, help="samples of every contender")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--images", type=Path, help="folder of photographs for the views; default: made up")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that holds FashionMNIST/raw")
    parser.add_argument("--epochs", type=int, default=Options.epochs, help="of the training up to an accuracy")
    parser.add_argument("--seeds", type=int, nargs="+", default=Options.seeds, help="of that training, one run each")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: use {', '.join(BENCHMARKS)}")
    return arguments
