"""Statistics of a step: known distributions, the split of the loss, what is logged when."""

import copy
import math
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from dino.loss import DINOLoss, EMACentering, LossTerms, SinkhornKnopp
from dino.loss.weighting import WeightingName
from dino.monitor import OutputStatistics, Statistics, distribution_statistics
from dino.monitor.statistics import prototypes_of_batch

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05


@dataclass
class Figures:
    outputs: OutputStatistics
    terms: LossTerms
    grad_norm: Tensor
    grad_norms: Tensor
    grad_names: list[str]


STUDENT = torch.nn.Linear(3, 2, bias=False)
STUDENT.weight.grad = torch.tensor([[1.0, -2.0, 3.0], [0.0, 0.5, -0.5]])
GRADIENTS = (torch.tensor(1.5), torch.tensor([1.5]), ["weight"])


def random_logits(views: int, batch: int, prototypes: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(views * batch, prototypes, generator=generator, dtype=dtype) * 0.3


def figures_of(loss: DINOLoss, num_views: int = 6, dtype: torch.dtype = torch.float64) -> Figures:
    student, teacher = random_logits(num_views, 3, 16, 0, dtype), random_logits(2, 3, 16, 1, dtype)
    student.requires_grad_()
    return Figures(outputs_of(loss, student, teacher), loss(student, teacher, 2, TEACHER_TEMP), *GRADIENTS)


def outputs_of(loss: DINOLoss, student: Tensor, teacher: Tensor) -> OutputStatistics:
    """Of student [V*B, K] and teacher [2*B, K] logits."""
    targets = loss.centering.targets(teacher, TEACHER_TEMP)
    return OutputStatistics.of(student.detach().chunk(2 * len(student) // len(teacher)), targets, loss.student_temp)


def make_loss(center: float = 0.2) -> DINOLoss:
    loss = DINOLoss(EMACentering(out_dim=16), student_temp=STUDENT_TEMP).double()
    loss.centering.center.copy_(torch.linspace(-center, center, 16))
    return loss


def numbers(student: Tensor, teacher: Tensor, temp: float = 1.0) -> dict[str, float]:
    views = student.chunk(2 * len(student) // len(teacher))
    return {name: value.item() for name, value in distribution_statistics(views, teacher, temp, 2).items()}


def one_hot(rows: list[int], prototypes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(rows), prototypes).float()


@pytest.mark.parametrize("num_views", [2, 3, 8])
def test_the_loss_is_teacher_entropy_plus_kl(num_views: int) -> None:
    """Exactly, with the center that the loss was computed with and every pair counting equally."""
    loss = make_loss()
    found = Statistics().compute(0, figures_of(loss, num_views), loss, STUDENT)
    assert found["train/kl_teacher_student"] > 0.1
    total = found["train/entropy_teacher"] + found["train/kl_teacher_student"]
    assert found["train/loss"] == pytest.approx(total, rel=1e-12)
    assert found["train/cross_entropy"] == pytest.approx(total, rel=1e-12)


def test_the_split_holds_to_a_millionth_in_float32() -> None:
    loss = DINOLoss(EMACentering(out_dim=16), student_temp=STUDENT_TEMP, koleo_weight=0.1)
    student, teacher = random_logits(4, 3, 16, 0, torch.float32), random_logits(2, 3, 16, 1, torch.float32)
    terms = loss(student, teacher, 2, TEACHER_TEMP, torch.randn(12, 5))
    figures = Figures(outputs_of(loss, student, teacher), terms, *GRADIENTS)
    found = Statistics().compute(0, figures, loss, STUDENT)
    total = found["train/entropy_teacher"] + found["train/kl_teacher_student"]
    assert found["train/cross_entropy"] == pytest.approx(total, abs=1e-6)


def test_against_plain_loops() -> None:
    """Every figure from its definition, pair by pair."""
    batch, prototypes, num_views = 16, 5, 5
    student = random_logits(num_views, batch, prototypes, 2)
    teacher = torch.softmax(random_logits(2, batch, prototypes, 3) / TEACHER_TEMP, dim=-1)
    p = teacher.view(2, batch, prototypes)
    q = torch.softmax(student / STUDENT_TEMP, dim=-1).view(num_views, batch, prototypes)
    kl, same = [], []
    for i in range(2):
        for j in range(num_views):
            if i == j:
                continue
            for b in range(batch):
                kl.append(sum(float(x * (x / y).log()) for x, y in zip(p[i, b], q[j, b], strict=True)))
                same.append(float(p[i, b].argmax() == q[j, b].argmax()))
    entropy = -(q * q.log()).sum(dim=-1)
    found = numbers(student, teacher, STUDENT_TEMP)
    assert found == pytest.approx(
        {
            "cross_entropy": float(-(p * p.log()).sum(dim=-1).mean()) + sum(kl) / len(kl),
            "entropy_teacher": float(-(p * p.log()).sum(dim=-1).mean()),
            "entropy_student": float(entropy.mean()),
            "entropy_student_global": float(entropy[:2].mean()),
            "entropy_student_local": float(entropy[2:].mean()),
            "kl_teacher_student": sum(kl) / len(kl),
            "confidence_teacher": float(p.max(dim=-1).values.mean()),
            "confidence_student": float(q.max(dim=-1).values.mean()),
            "teacher_agreement": float((p[0].argmax(dim=-1) == p[1].argmax(dim=-1)).double().mean()),
            "student_teacher_agreement": sum(same) / len(same),
        },
        rel=1e-10,
    )
    assert 0 < found["student_teacher_agreement"] < 1


def test_a_uniform_collapse_has_its_values() -> None:
    """K a power of two, so that ln K is met to the last bits."""
    found = numbers(torch.zeros(8, 1024), torch.full((4, 1024), 1 / 1024))
    assert found["entropy_teacher"] == pytest.approx(math.log(1024), rel=1e-6)
    assert found["entropy_student"] == pytest.approx(math.log(1024), rel=1e-6)
    assert found["kl_teacher_student"] == pytest.approx(0, abs=1e-5)
    assert found["confidence_teacher"] == 1 / 1024
    assert found["confidence_student"] == pytest.approx(1 / 1024, rel=1e-6)


def test_a_constant_collapse_has_exactly_its_values() -> None:
    """Everything on prototype 3: entropies and KL are 0, not NaN from 0 * log 0."""
    assert numbers(1e4 * one_hot([3] * 8, 16), one_hot([3] * 4, 16)) == {
        "cross_entropy": 0,
        "entropy_teacher": 0,
        "entropy_student": 0,
        "entropy_student_global": 0,
        "entropy_student_local": 0,
        "kl_teacher_student": 0,
        "confidence_teacher": 1,
        "confidence_student": 1,
        "teacher_agreement": 1,
        "student_teacher_agreement": 1,
    }


def test_agreements_and_used_prototypes_count_what_they_say() -> None:
    teacher = one_hot([0, 1, 2, 3, 0, 1, 5, 6], 8)  # the two views agree on 2 of 4 images; 6 prototypes in all
    student = one_hot([0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3], 8)  # the local view repeats teacher view 0
    found = numbers(student, teacher)
    assert found["teacher_agreement"] == 0.5
    assert prototypes_of_batch(teacher)[0].sum() == 6
    # pairs (teacher, student): (0, 1) 1 of 4, (1, 0) 1 of 4, (0, 2) 4 of 4, (1, 2) 2 of 4
    assert found["student_teacher_agreement"] == 8 / 16


def test_entropy_of_a_known_distribution() -> None:
    teacher = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).repeat(2, 1)
    student = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]])).repeat(2, 1)
    found = numbers(student, teacher)
    assert found["entropy_teacher"] == pytest.approx(1.5 * math.log(2), rel=1e-6)
    assert found["entropy_student"] == pytest.approx(1.75 * math.log(2), rel=1e-6)
    assert found["kl_teacher_student"] == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert "entropy_student_local" not in found


def test_low_precision_logits_are_raised_first() -> None:
    student, teacher = random_logits(4, 3, 4096, 0), random_logits(2, 3, 4096, 1)
    targets = torch.softmax(teacher / TEACHER_TEMP, dim=-1)
    low = distribution_statistics(student.bfloat16(), targets.float(), STUDENT_TEMP, 2)
    exact = distribution_statistics(student.bfloat16().double(), targets.float().double(), STUDENT_TEMP, 2)
    for name, value in low.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=1e-4), name


def test_compute_gives_the_promised_names_and_reads_the_loss_exactly() -> None:
    loss = make_loss()
    figures = figures_of(loss)
    found = Statistics().compute(0, figures, loss, STUDENT)
    promised = {
        "loss loss_global loss_local entropy_teacher entropy_student entropy_student_global entropy_student_local "
        "kl_teacher_student confidence_teacher teacher_agreement student_teacher_agreement num_prototypes_used "
        "center_norm grad_norm cross_entropy confidence_student entropy_batch_mean mutual_information loss_uniform "
        "weight_global weight_local grad_mean grad_std grad_min grad_max"
    }
    of_training = {f"train/{name}" for names in promised for name in names.split()}
    assert found.keys() == of_training | {f"grad/weight/{kind}" for kind in ("norm", "mean", "std", "min", "max")}
    assert all(type(value) is float for value in found.values())
    assert found["train/loss"] == figures.terms.total.item()
    assert found["train/center_norm"] == pytest.approx(float(loss.centering.center.norm()))
    assert found["train/grad_norm"] == 1.5
    assert found["train/loss_uniform"] == math.log(16)


def test_terms_that_a_run_does_not_have_are_left_out() -> None:
    loss = DINOLoss(SinkhornKnopp(), student_temp=STUDENT_TEMP)
    found = Statistics().compute(0, figures_of(loss, num_views=2, dtype=torch.float32), loss, STUDENT)
    assert found.keys().isdisjoint({"train/loss_local", "train/entropy_student_local", "train/center_norm"})


def test_the_koleo_term_is_shown_where_it_is_used() -> None:
    loss = DINOLoss(EMACentering(out_dim=16), student_temp=STUDENT_TEMP, koleo_weight=0.1)
    student, teacher = random_logits(4, 3, 16, 0, torch.float32), random_logits(2, 3, 16, 1, torch.float32)
    terms = loss(student, teacher, 2, TEACHER_TEMP, torch.randn(12, 5))
    figures = Figures(outputs_of(loss, student, teacher), terms, *GRADIENTS)
    assert terms.koleo is not None
    assert Statistics().compute(0, figures, loss, STUDENT)["train/loss_koleo"] == pytest.approx(terms.koleo.item())


def test_of_the_whole_batch_against_numpy() -> None:
    """The mean output, what it says of the images, and the prototypes in use."""
    loss = make_loss()
    figures = figures_of(loss)
    found = Statistics().compute(0, figures, loss, STUDENT)
    p = loss.centering.targets(random_logits(2, 3, 16, 1), TEACHER_TEMP).numpy()
    mean = p.mean(axis=0)
    entropy = float(-(mean * np.log(mean)).sum())
    assert found["train/entropy_batch_mean"] == pytest.approx(entropy, rel=1e-12)
    assert found["train/mutual_information"] == pytest.approx(entropy + (p * np.log(p)).sum(axis=1).mean(), rel=1e-12)
    assert found["train/num_prototypes_used"] == len(np.unique(p.argmax(axis=1)))


@pytest.mark.parametrize("weighting", ["pairs", "balanced", "adaptive"])
def test_the_weights_of_the_terms_make_the_loss(weighting: WeightingName) -> None:
    loss = DINOLoss(EMACentering(out_dim=16), STUDENT_TEMP, weighting).double()
    for step in range(3):
        figures = figures_of(loss)
        loss.observe(figures.terms)
        loss.update(progress=0.2 * (step + 1))
    found = Statistics().compute(0, figures_of(loss), loss, STUDENT)
    weighted = [found[f"train/weight_{name}"] * found[f"train/loss_{name}"] for name in ("global", "local")]
    assert found["train/loss"] == pytest.approx(sum(weighted), rel=1e-12)
    assert found["train/weight_local"] == {"pairs": 8 / 10, "balanced": 1.0}.get(weighting, found["train/weight_local"])


def test_the_host_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where tensors become numbers; every one of these waits for a GPU."""
    reads: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *arguments: object, name: str = name, original: object = original) -> object:
            reads.append(name)
            return original(self, *arguments)  # type: ignore[operator]

        monkeypatch.setattr(Tensor, name, counted)
    loss = make_loss()
    figures = figures_of(loss)
    reads.clear()
    Statistics().compute(0, figures, loss, STUDENT)
    assert reads == ["tolist"]


def test_distributions_of_gradients_are_measured_at_some_of_the_logged_steps() -> None:
    loss = make_loss()
    statistics, figures = Statistics(every_steps=2, gradients_every=3), figures_of(loss)
    logged = [step for step in range(18) if statistics.due(step)]
    found = [step + 1 for step in logged if "grad/weight/std" in statistics.compute(step, figures, loss, STUDENT)]
    assert found == [1, 6, 12, 18]
    assert all("grad/weight/norm" in statistics.compute(step, figures, loss, STUDENT) for step in logged)


def test_the_loss_module_is_only_read() -> None:
    loss = make_loss()
    figures = figures_of(loss)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    Statistics().compute(0, figures, loss, STUDENT)
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_first_step_and_every_tenth_are_logged() -> None:
    statistics = Statistics(every_steps=10)
    assert [step + 1 for step in range(40) if statistics.due(step)] == [1, 10, 20, 30, 40]
    assert all(Statistics(every_steps=1).due(step) for step in range(5))


def test_a_period_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"monitor\.every_steps=0"):
        Statistics(every_steps=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_and_waits_for_the_device_once() -> None:
    loss = make_loss()
    figures = figures_of(loss)
    expected = Statistics().compute(0, figures, loss, STUDENT)
    loss.cuda()
    student, teacher = random_logits(6, 3, 16, 0).cuda(), random_logits(2, 3, 16, 1).cuda()
    terms, outputs = loss(student, teacher, 2, TEACHER_TEMP), outputs_of(loss, student, teacher)
    on_gpu = Figures(outputs, terms, figures.grad_norm.cuda(), figures.grad_norms.cuda(), figures.grad_names)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as synchronisations:
            warnings.simplefilter("always")
            found = Statistics().compute(0, on_gpu, loss, copy.deepcopy(STUDENT).cuda())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found == pytest.approx(expected, rel=1e-9)
    assert len(synchronisations) == 1, [str(warning.message) for warning in synchronisations]
