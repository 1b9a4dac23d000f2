"""From samples to figures: medians with quartiles, of samples that nothing disturbed.

A sample is disturbed, and left out where enough others remain, if other processes took more than 5 % of the machine's
cores while it ran (as /proc/stat counts, what a hypervisor took included), or if a fixed matrix product around it was
1.3 times slower than the fastest of the comparison. Ratios are taken within a round, and once more for the rounds in
which the cores were near each other and for those in which they were far, where there were both (`cores.py`).
"""

import statistics
from collections.abc import Sequence
from typing import Any

MAX_OTHERS = 0.05  # share of all cores
MAX_SLOWER = 1.3  # of the fixed product
MAX_NEAR = 1.6  # times the shortest way between the cores of a comparison
PLACES = ("near", "far")  # of the cores


def summarise(
    measured: dict[str, dict[str, Any]], references: Sequence[str], min_clean: int
) -> dict[str, dict[str, Any]]:
    """Median and quartiles of the clean samples, how many times faster than each reference (in all rounds, and with the
    cores near and far), and the samples."""
    fastest: dict[int, float] = {}  # seconds of the fixed product by number of threads
    for of_one in measured.values():
        quickest = min(min(sample["calibration_s"]) for sample in of_one["samples"])
        fastest[of_one["threads"]] = min(quickest, fastest.get(of_one["threads"], quickest))
    rounds: dict[str, list[float]] = {}
    clean: dict[str, list[bool]] = {}
    for name, of_one in measured.items():
        rounds[name] = [statistics.median(sample["seconds"]) for sample in of_one["samples"]]
        clean[name] = [
            sample["others"] <= MAX_OTHERS and max(sample["calibration_s"]) <= MAX_SLOWER * fastest[of_one["threads"]]
            for sample in of_one["samples"]
        ]
    places = _places(measured)
    figures = {}
    for name, of_one in measured.items():
        used, noisy = _clean_or_all(rounds[name], clean[name], min_clean)
        times_faster, by_cores = {}, {}
        for reference in references:
            if reference in rounds:
                both = [own and other for own, other in zip(clean[name], clean[reference], strict=True)]
                times = [other / own for own, other in zip(rounds[name], rounds[reference], strict=True)]
                ratios, noisy_ratio = _clean_or_all(times, both, min_clean)
                times_faster[reference] = spread(ratios)
                noisy = noisy or noisy_ratio
                turns = list(zip(times, both, places[name], places[reference], strict=True))
                by_place = {place: [time for time, *turn in turns if turn == [True, place, place]] for place in PLACES}
                if name != reference and min(len(ratios) for ratios in by_place.values()) >= min_clean:
                    by_cores[reference] = {place: spread(ratios) for place, ratios in by_place.items()}
        figures[name] = {
            "seconds": spread(used),
            "times_faster": times_faster,
            **({"times_faster_by_cores": by_cores} if by_cores else {}),
            "num_clean": sum(clean[name]),
            "num_samples": len(rounds[name]),
            "noisy": noisy,
            "memory_mib": {key: round(of_one["memory_mib"][key], 1) for key in ("process", "extra", "prepared")},
            "answer": of_one["answer"],
            "samples": [
                {
                    "seconds": round(seconds, 6),
                    "others": round(sample["others"], 4),
                    "cores_ns": sample["cores_ns"],
                    "clean": is_clean,
                }
                for seconds, is_clean, sample in zip(rounds[name], clean[name], of_one["samples"], strict=True)
            ],
        }
    return figures


def _places(measured: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Of each contender: where the cores were in its samples, `near` each other or `far`, or whether they `moved`."""
    shortest = min(min(sample["cores_ns"]) for of_one in measured.values() for sample in of_one["samples"])

    def place(sample: dict[str, Any]) -> str:
        near = [way <= MAX_NEAR * shortest for way in sample["cores_ns"]]
        return "near" if all(near) else "moved" if any(near) else "far"

    return {name: [place(sample) for sample in of_one["samples"]] for name, of_one in measured.items()}


def _clean_or_all(values: list[float], clean: list[bool], min_clean: int) -> tuple[list[float], bool]:
    """The clean values, or all of them where too few are clean; and whether it came to that."""
    chosen = [value for value, is_clean in zip(values, clean, strict=True) if is_clean]
    return (chosen, False) if len(chosen) >= min_clean else (values, True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, first and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "low": low, "high": high}
