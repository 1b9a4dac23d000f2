"""An inspection as lines for the terminal."""

from collections.abc import Iterator

from dino.debug.inspection import LossInspection

VERDICTS = {True: "ok", False: "WRONG", None: "not checked"}


def lines_of(inspection: LossInspection) -> Iterator[str]:
    """Where it comes from, every tensor, the terms, what a logged step would say, gradients, and the checks."""
    subject = inspection.subject
    yield f"{subject.origin}; step {subject.step}, teacher temperature {subject.teacher_temp:.6g}"
    width = max(len(row.name) for row in inspection.rows) + 2
    yield f"\n{'tensor':<{width}}{'shape':<24}{'min':>12}{'max':>12}{'mean':>12}"
    for row in inspection.rows:
        shape = f"[{', '.join(map(str, row.shape))}]"
        yield f"{row.name:<{width}}{shape:<24}{row.low:>12.5g}{row.high:>12.5g}{row.mean:>12.5g}"
    yield f"\n{'term':<{width}}{'value':>12}{'weight':>12}{'weighted':>12}"
    for term in inspection.terms:
        yield f"{term.name:<{width}}{term.value:>12.5g}{term.weight:>12.5g}{term.weight * term.value:>12.5g}"
    yield f"{'loss':<{width}}{inspection.total:>36.5g}"
    yield f"\n{'statistic':<{width}}{'value':>12}"
    for name, value in inspection.statistics.items():
        yield f"{name:<{width}}{value:>12.5g}"
    yield f"\n{'gradient of the student':<{width}}{'norm':>12}"
    for group, norm in inspection.gradient_norms.items():
        yield f"{group:<{width}}{norm:>12.5g}"
    yield ""
    for check in inspection.checks:
        yield f"{VERDICTS[check.holds]:<12}{check.name} ({check.detail})"
