"""The distributions of teacher and student, drawn."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dino.debug.inspection import LossInspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"teacher": "#0072b2", "student": "#d55e00"}  # told apart with any colour vision


def write_figure(inspection: LossInspection, path: Path) -> None:
    """Writes a PNG: entropy, largest probability, concentration, and how often views agree."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # late: a second
    from matplotlib.figure import Figure

    figures = inspection.distributions.figures()
    subject = inspection.subject
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{subject.origin}; step {subject.step}, teacher temperature {subject.teacher_temp:.4g}", fontsize=9
    )
    (entropy, largest), (concentration, agreement) = figure.subplots(2, 2)

    uniform = inspection.statistics["loss_uniform"]
    _histograms(entropy, figures, "entropy")
    entropy.axvline(uniform, color="black", linestyle="--", label=f"ln K = {uniform:.4g}, uniform")
    entropy.set(title="Entropy of an output", xlabel="entropy [nats]", ylabel="share of outputs")
    entropy.legend()
    _histograms(largest, figures, "max_probability")
    largest.set(title="Largest probability of an output", xlabel="probability", ylabel="share of outputs", xlim=(0, 1))
    largest.legend()

    ranks = figures["teacher"]["concentration"]["rank"]
    for network, colour in COLOURS.items():
        mass = np.array(figures[network]["concentration"]["mass"], dtype=float)  # null becomes NaN, and is not drawn
        concentration.plot(ranks, mass, marker="o", markersize=3, color=colour, label=network)
    uniform_mass = np.array(ranks) / figures["num_prototypes"]
    concentration.plot(ranks, uniform_mass, color="black", linestyle="--", label="uniform")
    concentration.set_xscale("log", base=2)
    concentration.set(
        title="Concentration", xlabel="most likely prototypes", ylabel="probability in them", ylim=(0, 1.02)
    )
    concentration.legend()

    names = {"teacher": "all teacher views\nof an image", "student_teacher": "teacher and student\nviews of an image"}
    shares = [figures["agreement"][name] for name in names]
    bars = agreement.bar(list(names.values()), shares, color=list(COLOURS.values()), width=0.5)
    agreement.bar_label(bars, fmt="{:.0%}")
    agreement.set(title="Agreement on the most likely prototype", ylabel="share", ylim=(0, 1.1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, format="png")


def _histograms(axes: "Axes", figures: dict[str, dict[str, dict[str, list[float]]]], name: str) -> None:
    for network, colour in COLOURS.items():
        histogram = figures[network][name]
        counts = np.array(histogram["counts"], dtype=float)
        axes.stairs(
            counts / max(counts.sum(), 1), histogram["edges"], fill=True, color=colour, alpha=0.5, label=network
        )
