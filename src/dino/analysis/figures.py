"""The pictures of a report: which metrics belong together, with the words to read them by."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dino.analysis.charts import (
    COLOURS,
    MAX_POINTS,
    Chart,
    Curve,
    Drawing,
    HeatMap,
    Plan,
    chart_of,
    curve,
    marks,
    short,
)
from dino.analysis.classes import classes_of
from dino.analysis.correlations import matrix
from dino.analysis.distributions import distributions
from dino.analysis.history import History, labels, mean
from dino.analysis.schedules import planned

PARTS_OF_A_STEP = ("perf/data_wait_s", "perf/forward_s", "perf/backward_s", "perf/update_s")
LN_K = {"train/loss_uniform": "ln K: a uniform student"}
LEARNING = (
    Plan(
        metrics=["val/knn_top1", "val/view_retrieval_top1"],
        name="knn",
        title="Features: k-NN and view retrieval",
        caption="Of the teacher on held-out images; higher is better. Step 0 is the untrained network. k-NN needs "
        "labels; view retrieval finds the other view of the same image, without labels.",
        y="%",
        references={"val/knn_top1_pixels": "raw pixels"},
        untrained="val/knn_top1",
    ),
    Plan(
        metrics=["val/effective_rank_ratio", "val/feature_std"],
        name="label_free",
        title="Features: effective rank and spread",
        caption="Without labels; near 0 the features have collapsed. Effective rank as a share of what is "
        "attainable; standard deviation of normalised features x sqrt(D), 1 where they fill the sphere.",
        y="share of the largest",
        untrained="val/effective_rank_ratio",
    ),
    Plan(
        metrics=["train/loss", "val/loss"],
        name="loss",
        title="Loss",
        caption="The loss alone is no measure of progress: it follows the temperature and the teacher's entropy. "
        "At ln K the student says the same about every image.",
        y="nats",
        references=LN_K,
    ),
    Plan(
        metrics=["train/loss_global", "train/loss_local", "train/loss_koleo"],
        name="loss_components",
        title="Terms of the loss",
        caption="Global: a teacher's view against the other global view; local: against the local views.",
        y="nats",
    ),
    Plan(
        metrics=["train/weight_global", "train/weight_local"],
        name="weights",
        title="Weights of the terms",
        caption="Of the global and the local term in the total; they move with loss.weighting=adaptive alone.",
        y="weight",
    ),
    Plan(
        metrics=["train/cross_entropy", "train/entropy_teacher", "train/kl_teacher_student"],
        name="cross_entropy",
        title="Cross-entropy = teacher entropy + KL(teacher, student)",
        caption="KL is what the student has not learned yet; the entropy belongs to the teacher alone.",
        y="nats",
    ),
    Plan(
        metrics=[
            "train/entropy_teacher",
            "train/entropy_student",
            "train/entropy_batch_mean",
            "train/mutual_information",
        ],
        name="entropy",
        title="Entropies",
        caption="Healthy: each image is assigned sharply (low), the batch as a whole uses many prototypes (high); the "
        "mutual information of image and prototype is what lies between.",
        y="nats",
        references=LN_K,
    ),
    Plan(
        metrics=["train/confidence_teacher", "train/confidence_student"],
        name="confidence",
        title="Confidence",
        caption="Mean of the largest probability.",
        y="probability",
    ),
    Plan(
        metrics=["train/teacher_agreement", "train/student_teacher_agreement"],
        name="agreement",
        title="Agreement on the prototype",
        caption="Share of images whose views get the same prototype: of the teacher with itself, and of both.",
        y="share",
    ),
    Plan(
        metrics=["train/num_prototypes_used"],
        name="prototypes",
        title="Prototypes used",
        caption="How many prototypes are the teacher's first choice for some image of the batch.",
        y="prototypes",
    ),
    Plan(
        metrics=["train/center_norm"],
        name="center_norm",
        title="Norm of the center",
        caption="What is subtracted from the teacher's logits; it should settle.",
        y="norm",
    ),
)
GRADIENTS = Plan(
    name="grad_norm",
    title="Gradient norm",
    caption="Of the whole student, before clipping.",
    y="norm",
    metrics=["train/grad_norm"],
    log=True,
)
AS_PLANNED = "As trained; faint: as planned for the whole run."
SCHEDULES = tuple(
    Plan(name=name, title=title, caption=AS_PLANNED, y=title.lower(), metrics=[f"train/{name}"])
    for name, title in (
        ("lr", "Learning rate"),
        ("weight_decay", "Weight decay"),
        ("teacher_momentum", "Teacher momentum"),
        ("teacher_temp", "Teacher temperature"),
    )
)
PERFORMANCE = (
    Plan(name="images_per_s", title="Speed", caption="Of all ranks.", y="images/s", metrics=["perf/images_per_s"]),
    Plan(
        name="memory",
        title="Memory",
        caption="Of the process; allocated and reserved: on the GPU, by torch.",
        y="GiB",
        metrics=[
            "perf/process_memory_gib",
            "perf/peak_memory_gib",
            "perf/memory_allocated_gib",
            "perf/memory_reserved_gib",
        ],
    ),
)


def learning(histories: Sequence[History]) -> list[Drawing]:
    """Whether it learns: quality of the features, the loss and its parts, and what student and teacher say."""
    return _drawn([chart_of(histories, plan) for plan in LEARNING])


def optimisation(histories: Sequence[History]) -> list[Drawing]:
    """Gradients and schedules."""
    groups = [groups for each in _by_run(histories) if (groups := _gradient_groups(*each))]
    schedules = [chart_of(histories, plan, _planned(histories, plan.name)) for plan in SCHEDULES]
    return [*_drawn([chart_of(histories, GRADIENTS)]), *groups, *_drawn(schedules)]


def performance(histories: Sequence[History]) -> list[Drawing]:
    """Speed and memory."""
    charts = [chart_of(histories, plan) for plan in PERFORMANCE]
    return _drawn([*charts, *(_step_time(*each) for each in _by_run(histories))])


def correlated(histories: Sequence[History]) -> list[Drawing]:
    """Rank correlations of all metrics of a step with each other."""
    caption = "Spearman's rank correlation over the logged steps; what merely falls together correlates too."
    found: list[Drawing] = []
    for history, run, mark in _by_run(histories):
        names, values = matrix(history)
        words = [short(name) for name in names]
        if len(names) > 1:
            heat_map = HeatMap(
                name=f"correlations{mark}",
                title=f"Which metrics move together{run}",
                caption=caption,
                x="",
                columns=words,
                rows=words,
                values=values,
                unit="rank correlation",
                symmetric=True,
            )
            found.append(heat_map)
    return found


def drawings_of(history: History) -> list[Drawing]:
    """All pictures of one run, as they are saved in `plots/`."""
    runs = [history]
    classes = classes_of(history)
    found = [*learning(runs), *optimisation(runs), *performance(runs), *classes, *distributions(history)]
    return [*found, *correlated(runs)]


# ---------------------------------------------------------------------- pieces


def _drawn(charts: Sequence[Chart]) -> list[Drawing]:
    """Those that have something to show."""
    return [chart for chart in charts if chart.curves]


def _by_run(histories: Sequence[History]) -> list[tuple[History, str, str]]:
    """What cannot be overlaid is drawn for each run: with its name for titles, and its number for names of elements."""
    if len(histories) == 1:
        return [(histories[0], "", "")]
    names = labels(histories)
    return [(history, f": {names[place]}", f"_{place}") for place, history in enumerate(histories)]


def _planned(histories: Sequence[History], name: str) -> list[Curve]:
    """A schedule over the whole of each run."""
    curves = []
    for place, (history, run) in enumerate(zip(histories, labels(histories), strict=True)):
        label = f"{run}: planned" if len(histories) > 1 else "planned"
        plan = planned(history, name)
        curves += [curve(label, plan, COLOURS[place % len(COLOURS)], "dot", True)] if len(plan) else []
    return curves


def _gradient_groups(history: History, run: str, mark: str) -> HeatMap | None:
    names = [name for name in history.names if name.startswith("grad/") and name.endswith("/norm")]
    if not names:
        return None
    steps, values = _binned(history, names)
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.where(values > 0, np.log10(values), np.nan)
    return HeatMap(
        name=f"grad_groups{mark}",
        title=f"Gradient norm by group of layers{run}",
        caption="Before clipping, in the order of the network; the last layer is still while it is frozen.",
        x="optimizer step",
        columns=steps,
        rows=[name.split("/")[1] for name in names],
        values=logarithms,
        unit="log10 of the norm",
        marks=marks([history]),
    )


def _step_time(history: History, run: str, mark: str) -> Chart:
    names = [name for name in PARTS_OF_A_STEP if len(history.series(name))]
    curves: list[Curve] = []
    if names:
        steps, values = _binned(history, names)
        curves = [
            Curve(label=short(name), x=steps, y=np.nan_to_num(row).tolist(), colour=COLOURS[index])
            for index, (name, row) in enumerate(zip(names, values, strict=True))
        ]
    return Chart(
        name=f"step_time{mark}",
        title=f"Where the time of a step goes{run}",
        caption="Means over neighbouring logged steps. Waiting for data above a third: more workers.",
        y="s a step",
        curves=curves,
        marks=marks([history]),
        stacked=True,
    )


def _binned(history: History, names: Sequence[str]) -> tuple[list[float], Any]:
    """Metrics that are logged together, as means over at most 100 stretches of steps: steps, [names, steps]."""
    steps = history.series(names[0]).steps
    stretches = np.array_split(np.arange(len(steps)), min(len(steps), MAX_POINTS // 4))
    rows = []
    for name in names:
        series = history.series(name)
        values = np.full(len(steps), math.nan)
        _, of_all, of_series = np.intersect1d(steps, series.steps, return_indices=True)
        values[of_all] = series.values[of_series]
        rows.append([mean(values[stretch]) for stretch in stretches])
    return [float(steps[stretch[len(stretch) // 2]]) for stretch in stretches], np.array(rows)
