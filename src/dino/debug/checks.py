"""What must hold in a step, each as one sentence.

Shapes: B images in the batch, G global views, L local views, V = G + L, D features, K prototypes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino.augmentation import ViewBatch
from dino.debug.subject import Subject
from dino.loss import EMACentering, LossTerms
from dino.loss.reference import LossSteps
from dino.loss.weighting import PairsWeighting
from dino.model import StudentTeacher, WiringError
from dino.model.wiring import check_equal, check_no_shared_storage, stochastic_modules

TOLERANCE = 1e-4  # two float32 computations of the same number in a different order
NUM_NAMED = 4  # tensors that a sentence names
UNIFORM = 0.995  # share of ln K from which an entropy counts as that of a uniform distribution
CONSTANT = 0.01  # share of the attainable information about images up to which outputs count as constant


@dataclass(frozen=True)
class Check:
    """Something that must hold; `holds` is None where it cannot be told with these settings."""

    name: str
    holds: bool | None
    detail: str


def finite(tensors: Mapping[str, Tensor]) -> Check:
    """Names, in the order of the computation, what holds NaN or inf."""
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    return Check("every number is finite", not broken, f"not finite: {_listed(broken)}" if broken else "no NaN, no inf")


def shapes(views: ViewBatch, student_logits: Tensor, teacher_logits: Tensor, features: Tensor) -> Check:
    """[V*B, K], [G*B, K], [V*B, D]."""
    num_global_views, batch = views.global_views.shape[:2]
    num_views = num_global_views + (0 if views.local_views is None else len(views.local_views))
    rows = (len(student_logits), len(features), len(teacher_logits))
    fit = rows == (num_views * batch, num_views * batch, num_global_views * batch)
    fit = fit and student_logits.shape[1] == teacher_logits.shape[1]
    detail = f"B={batch}, G={num_global_views}, V={num_views}, K={student_logits.shape[1]}, D={features.shape[1]}"
    return Check("student has V*B rows, teacher G*B, of K prototypes", fit, detail)


# ---------------------------------------------------------------------- student and teacher


def wiring(model: StudentTeacher, step: int) -> list[Check]:
    """Before the step, which leaves gradients."""
    found = [_wired("the teacher shares no memory with the student", check_no_shared_storage, model)]
    if step == 0:
        found.append(_wired("the teacher equals the student at step 0", check_equal, model))
    active = [name for name, part, attribute in stochastic_modules(model.teacher) if getattr(part, attribute) != 0]
    return [*found, Check("the teacher drops nothing at random", not active, _listed(active) or "no drop path")]


def _wired(name: str, check: Callable[[nn.Module, nn.Module], None], model: StudentTeacher) -> Check:
    try:
        check(model.student, model.teacher)
    except WiringError as error:
        return Check(name, False, str(error))
    return Check(name, True, f"{len(list(model.teacher.parameters()))} tensors compared")


def gradients(model: StudentTeacher) -> list[Check]:
    """After the backward pass."""
    trained = {name: p for name, p in model.student.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    reached = f"{len(trained) - len(without)} of {len(trained)} tensors"
    detail = f"{reached}; none at {_listed(without)}" if without else reached
    touched = [name for name, p in model.teacher.named_parameters() if p.grad is not None or p.requires_grad]
    return [
        Check("gradients reach the whole student", bool(trained) and not without, detail),
        Check("no gradient reaches the teacher", not touched, _listed(touched) or "none"),
    ]


# ---------------------------------------------------------------------- logits, probabilities, terms


def logits_in_range(model: StudentTeacher, student_logits: Tensor, teacher_logits: Tensor) -> Check:
    """Each logit is a cosine times the gain of its prototype."""
    largest = [logits.detach().abs().max().item() for logits in (student_logits, teacher_logits)]
    gains = [network.head.last_layer.weight_g.abs().max().item() for network in (model.student, model.teacher)]
    fit = all(value <= gain + TOLERANCE for value, gain in zip(largest, gains, strict=True))
    detail = f"student {largest[0]:.3g} of {gains[0]:.3g}, teacher {largest[1]:.3g} of {gains[1]:.3g}"
    return Check("no logit is beyond the gain of the prototypes", fit, detail)


def distributions(steps: LossSteps, targets: Tensor) -> list[Check]:
    student = torch.cat(steps.student_log_probabilities).detach().exp()
    found = []
    for name, probabilities in (("teacher", targets), ("student", student)):
        off = (probabilities.sum(dim=-1) - 1).abs().max().item()
        low, high = probabilities.min().item(), probabilities.max().item()
        found.append(Check(f"{name}'s probabilities sum to 1", off < TOLERANCE, f"off by at most {off:.1e}"))
        in_range = low >= 0 and high <= 1 + TOLERANCE
        found.append(Check(f"{name}'s probabilities lie in 0 to 1", in_range, f"from {low:.3g} to {high:.3g}"))
    return found


def terms(weighted: Sequence[tuple[float, float]], terms: LossTerms) -> list[Check]:
    """Pairs of weight and value against the total."""
    total, expected = terms.total.item(), sum(weight * value for weight, value in weighted)
    entropies = [term.item() for term in (terms.global_term, terms.local_term) if term is not None]
    return [
        Check(
            "weighted terms sum to the loss",
            abs(total - expected) <= TOLERANCE * max(abs(total), 1e-3),
            f"{expected:.6g} and {total:.6g}",
        ),
        Check("no cross-entropy is negative", all(value >= 0 for value in entropies), f"least {min(entropies):.6g}"),
    ]


def against_reference(subject: Subject, terms: LossTerms, steps: LossSteps) -> list[Check]:
    """The loss that trains against the step-by-step one, which knows EMA centering and equal pairs only."""
    loss = subject.loss
    if not isinstance(loss.centering, EMACentering):
        reason = f"the step-by-step loss has no {type(loss.centering).__name__}"
        return [Check("the loss equals the step-by-step one", None, reason)]
    checks = [_equal("global term equals the step-by-step one", terms.global_term, steps.global_term)]
    if terms.local_term is not None and steps.local_term is not None:
        checks.append(_equal("local term equals the step-by-step one", terms.local_term, steps.local_term))
    if isinstance(loss.weighting, PairsWeighting) and terms.koleo is None:
        checks.append(_equal("total equals the step-by-step one", terms.total, steps.total))
    if loss.centering.init == "zeros" or subject.step > 0:
        checks.append(_equal("the center after the step equals it too", loss.centering.center, steps.center_after))
    return checks


def _equal(name: str, ours: Tensor, reference: Tensor) -> Check:
    off = (ours - reference).abs().max().item()
    scale = reference.abs().max().item()
    return Check(name, off <= TOLERANCE * max(scale, 1e-3), f"largest value {scale:.6g}, off by {off:.1e}")


# ---------------------------------------------------------------------- collapse


def cross_entropy_above_entropy(statistics: Mapping[str, float]) -> Check:
    """Their difference is KL(teacher || student), which is never negative."""
    cross_entropy, entropy = statistics["cross_entropy"], statistics["entropy_teacher"]
    detail = f"{cross_entropy:.6g} = {entropy:.6g} + KL of {cross_entropy - entropy:.3g}"
    return Check("cross-entropy is at least the teacher's entropy", cross_entropy - entropy >= -TOLERANCE, detail)


def tells_prototypes_apart(statistics: Mapping[str, float], teacher_temp: float, student_temp: float) -> list[Check]:
    """An entropy of ln K is that of the same probability for every prototype."""
    largest = statistics["loss_uniform"]
    advice = {
        "teacher": f"at a temperature of {teacher_temp:g}, which a lower loss.teacher_temp sharpens",
        "student": f"at a temperature of {student_temp:g}; a loss of ln K is that of such a student",
    }
    found = []
    for network in ("teacher", "student"):
        entropy = statistics[f"entropy_{network}"]
        share = f"entropy {entropy:.4g} is {100 * entropy / largest:.1f} % of ln K = {largest:.4g}"
        holds = entropy < UNIFORM * largest
        detail = share if holds else f"uniform outputs: {share}, {advice[network]}"
        found.append(Check(f"the {network}'s outputs are not uniform", holds, detail))
    return found


def tells_images_apart(statistics: Mapping[str, float], subject: Subject) -> Check:
    """The entropy of the mean output less the mean entropy is what the outputs say about the image: 0 if they are
    constant, at most ln K and ln B."""
    name, entropy = "the teacher tells images apart", statistics["entropy_teacher"]
    attainable = min(statistics["loss_uniform"], math.log(subject.views.global_views.shape[1]))
    information = statistics["entropy_batch_mean"] - entropy
    detail = f"outputs carry {information:.3g} of at most {attainable:.3g} nats about the image"
    if attainable == 0:
        return Check(name, None, "a batch of one image")
    if information > CONSTANT * attainable:
        return Check(name, True, detail)
    if subject.step < subject.steps_per_epoch:
        return Check(name, None, f"{detail}; in the first epoch that is no collapse yet")
    kind = "every image gets the same output"
    return Check(name, False, f"constant outputs: {kind}; {detail}; look at centering and loss.teacher_temp")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more
