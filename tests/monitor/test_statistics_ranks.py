"""Statistics over real gloo ranks: those of the whole batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dino import ranks
from dino.loss import DINOLoss, EMACentering, LossTerms
from dino.monitor import OutputStatistics, Statistics

RunRanks = Callable[..., list[Any]]


@dataclass
class Figures:
    outputs: OutputStatistics
    terms: LossTerms
    grad_norm: Tensor
    grad_norms: Tensor
    grad_names: list[str]


def compute(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Of logits [V, B, K] and [G, B, K]."""
    loss = DINOLoss(EMACentering(out_dim=student.shape[-1])).double()
    loss.centering.center.fill_(0.1)
    rows, teacher_rows = student.flatten(0, 1), teacher.flatten(0, 1)
    network = torch.nn.Linear(2, 2, bias=False).double()
    network.weight.grad = torch.ones(2, 2, dtype=torch.float64)
    norm = torch.tensor(1.5, dtype=torch.float64)
    outputs = OutputStatistics.of(student, loss.centering.targets(teacher_rows, 0.05), loss.student_temp)
    figures = Figures(outputs, loss(rows, teacher_rows, 2, 0.05), norm, norm[None], ["weight"])
    return Statistics().compute(0, figures, loss, network)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_log_what_one_process_logs(run_ranks: RunRanks, world_size: int) -> None:
    """All are means over images of equal parts, and a prototype counts once, whichever ranks use it."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 8, 16, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 8, 16, generator=generator, dtype=torch.float64)

    def own() -> dict[str, float]:
        part = ranks.own_part(8)
        return compute(student[:, part], teacher[:, part])

    expected = compute(student, teacher)
    results = run_ranks(own, world_size)
    for found in results:
        assert found == results[0]
        assert found == pytest.approx(expected, rel=1e-12)
        assert found["train/num_prototypes_used"] == expected["train/num_prototypes_used"]
    assert expected["train/num_prototypes_used"] > 4  # so that a mean over ranks would be another number
    if world_size == 1:
        assert results == [expected]


def test_a_logged_step_sends_one_message(run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        num_messages = 0
        send = torch.distributed.all_reduce

        def counted(*args: Any, **options: Any) -> None:
            nonlocal num_messages
            num_messages += 1
            send(*args, **options)

        monkeypatch.setattr(torch.distributed, "all_reduce", counted)
        compute(torch.zeros(4, 2, 8, dtype=torch.float64), torch.zeros(2, 2, 8, dtype=torch.float64))
        return num_messages

    assert run_ranks(count, 2) == [1, 1]
