"""How the step grows: with the batch, the local views, the prototypes, the size of images, the number of ranks.

ViT-Ti/16 with 4,096 prototypes, 2 + 6 views and a batch of 16 in bf16, but for the one quantity that changes. Ranks are
processes on this machine: one with all cores against one for each core with a share of the same batch.
"""

from typing import Any

from benchmarks.harness import NUM_CORES, Contender, compare, num_ranks
from benchmarks.options import Options
from benchmarks.step import contenders

BASE: dict[str, Any] = {"backbone": "vit_t16", "out_dim": 4096, "num_local_views": 6, "batch": 16}
QUICK: dict[str, Any] = {**BASE, "out_dim": 256, "batch": 2, "depth": 1, "global_size": 32, "local_size": 16}
AXES: dict[str, tuple[int, ...]] = {
    "batch": (4, 8, 16, 32),
    "num_local_views": (0, 2, 6, 10),
    "out_dim": (4096, 16384, 65536, 262144),
    "global_size": (128, 224, 320),
}
NAMES = ("baseline bf16", "ours bf16")


def measure(options: Options) -> list[dict[str, Any]]:
    base = QUICK if options.quick else BASE
    axes = {"batch": (2, 4)} if options.quick else AXES
    results = [
        _compare({**base, axis: value}, axis, value, options) for axis, values in axes.items() for value in values
    ]
    return [*results, _ranks(base, options)]


def _compare(settings: dict[str, Any], axis: str, value: int, options: Options) -> dict[str, Any]:
    return compare(
        f"{axis} {value:,}",
        contenders(settings, NAMES),
        options.sampling(rounds=3, seconds=0.5),
        per=settings["batch"],
        unit="images/s",
        references=NAMES[:1],
        facts={"axis": axis, "value": value},
    )


def _ranks(base: dict[str, Any], options: Options) -> dict[str, Any]:
    """On CPUs only: several GPUs are another machine."""
    ranks = num_ranks(base["batch"])
    alone, shared = base, {**base, "batch": base["batch"] // ranks}
    (one,) = contenders(alone, NAMES[1:])
    (of_several,) = contenders(shared, NAMES[1:])
    compared = [
        Contender(f"1 process, {NUM_CORES} threads", one.make, one.settings, NUM_CORES),
        Contender(f"{ranks} ranks, 1 thread each", of_several.make, of_several.settings, threads=1, ranks=ranks),
    ]
    return compare(
        "Ranks, on the CPU",
        compared,
        options.sampling(rounds=5, device="cpu"),
        per=base["batch"],
        unit="images/s",
        references=[compared[0].name],
    )
