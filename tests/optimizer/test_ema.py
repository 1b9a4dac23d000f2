"""The teacher's moving average, parameters and buffers."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dino.optimizer import EMA

STATISTICS = ("1.running_mean", "1.running_var")
COUNTER = "1.num_batches_tracked"


def pair() -> tuple[nn.Module, nn.Module]:
    """A student and a teacher with different parameters, statistics and counters."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    for _ in range(3):
        student(torch.randn(5, 3, dtype=torch.float64))
    teacher(torch.randn(5, 3, dtype=torch.float64))
    return student, teacher


def moved(old: torch.Tensor, towards: torch.Tensor, momentum: float) -> torch.Tensor:
    return momentum * old + (1 - momentum) * towards


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("buffers", ["own", "copy", "average"])
def test_update_equals_the_formula(momentum: float, buffers: Any) -> None:
    student, teacher = pair()
    old, new = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    EMA(buffers).update(student, teacher, momentum)
    state = teacher.state_dict()
    parameters = [name for name, _ in teacher.named_parameters()]
    assert len(parameters) == 6
    for name in parameters:
        torch.testing.assert_close(state[name], moved(old[name], new[name], momentum), rtol=1e-14, atol=1e-15)
    for name in STATISTICS:
        expected = {"own": old[name], "copy": new[name], "average": moved(old[name], new[name], momentum)}
        torch.testing.assert_close(state[name], expected[buffers], rtol=1e-14, atol=1e-15)
    assert state[COUNTER] == (1 if buffers == "own" else 3)
    assert all(torch.equal(student.state_dict()[name], value) for name, value in new.items())


def test_many_updates_stay_on_the_formula_when_the_momentum_moves() -> None:
    student, teacher = pair()
    ema, expected = EMA(), teacher[0].weight.clone()
    for step in range(20):
        with torch.no_grad():
            student[0].weight.add_(0.1)
        momentum = 0.9 + 0.005 * step
        ema.update(student, teacher, momentum)
        expected = moved(expected, student[0].weight.detach(), momentum)
    torch.testing.assert_close(teacher[0].weight, expected, rtol=1e-13, atol=0)


def test_one_average_may_serve_several_networks() -> None:
    ema = EMA()
    for _ in range(2):
        student, teacher = pair()
        for _ in range(2):
            expected = moved(teacher[0].weight.clone(), student[0].weight.detach(), 0.9)
            ema.update(student, teacher, 0.9)
            torch.testing.assert_close(teacher[0].weight, expected, rtol=1e-13, atol=0)


def test_teacher_shares_no_storage_and_gets_no_gradient_history() -> None:
    student, teacher = pair()
    EMA("copy").update(student, teacher, 0.0)
    for name, tensor in teacher.state_dict(keep_vars=True).items():
        assert not tensor.requires_grad
        assert tensor.data_ptr() != student.state_dict()[name].data_ptr()


def test_a_network_without_buffers() -> None:
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    EMA("average").update(student, teacher, 0.0)
    assert torch.equal(teacher.weight, student.weight)


def test_wrong_settings_are_refused_by_name() -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"ema\.buffers=both: use own, copy, average"):
        EMA("both")  # type: ignore[arg-type]
    for momentum in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"ema\.momentum="):
            EMA().update(student, teacher, momentum)
    with pytest.raises((ValueError, AssertionError)):
        EMA().update(nn.Linear(3, 3), teacher, 0.5)
