"""Measures this project beside a textbook implementation and lightly, on this machine.

    python benchmarks/run.py                        # everything: one to two hours on 2 cores
    python benchmarks/run.py step views --rounds 9  # some of it, for longer
    python benchmarks/run.py --quick                # does everything run: some minutes, figures without meaning
    python benchmarks/run.py --page                 # only writes the page and plots anew, from the results that exist

Results are benchmarks/results/DEVICE/NAME.json, and benchmarks/results/README.md made from them. With `--quick` they
go to a temporary folder instead.
"""

import sys
from pathlib import Path

# From the root, as a package: a module of ours must not be taken for one of the standard library.
sys.path[0] = str(Path(__file__).resolve().parents[1])

if __name__ == "__main__":
    from benchmarks.command import main

    main()
