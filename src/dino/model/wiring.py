"""Checks that student and teacher are wired as the method needs; each way to be wrong has its own error."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WiringError(RuntimeError):
    """Student and teacher are not wired as DINO needs."""


class SharedStorageError(WiringError):
    """A tensor of the teacher is the student's: the average would change the student."""


class TeacherDiffersError(WiringError):
    """The teacher does not start as the student."""


class TeacherTrainableError(WiringError):
    """The teacher would get gradients."""


class TeacherDropPathError(WiringError):
    """The teacher drops paths or units at random."""


class TeacherOptimizedError(WiringError):
    """The optimizer holds parameters of the teacher."""


class StudentFrozenError(WiringError):
    """The student, or its whole backbone or head, gets no gradients."""


def check_wiring(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Checks every invariant of the start of training, before the first step and before a resume.

    Raises:
        WiringError: its subclass for the first invariant that does not hold, naming a tensor.
    """
    check_no_shared_storage(student, teacher)
    check_equal(student, teacher)
    for name, parameter in teacher.named_parameters():
        if parameter.requires_grad or parameter.grad is not None:
            raise TeacherTrainableError(f"teacher.{name} gets gradients; only the average may change the teacher")
    for name, part in student.named_children():  # single ones may be fixed: the gain of the prototypes, some in timm
        if not any(parameter.requires_grad for parameter in part.parameters()):
            raise StudentFrozenError(f"no parameter of student.{name} gets gradients")
    for name, module, attribute in stochastic_modules(teacher):
        if getattr(module, attribute) != 0:
            raise TeacherDropPathError(f"teacher.{name} ({type(module).__name__}) is active; the teacher drops nothing")
    if optimizer is not None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in teacher.named_parameters():
            if id(parameter) in held:
                raise TeacherOptimizedError(f"the optimizer holds teacher.{name}")


def check_no_shared_storage(student: nn.Module, teacher: nn.Module) -> None:
    """Raises `SharedStorageError` if any parameter or buffer of the two lies in the same memory."""
    owners = {_storage(tensor): name for name, tensor in _tensors(student)}
    for name, tensor in _tensors(teacher):
        if _storage(tensor) in owners:
            raise SharedStorageError(f"teacher.{name} lies in the memory of student.{owners[_storage(tensor)]}")


def check_equal(student: nn.Module, teacher: nn.Module) -> None:
    """Raises `TeacherDiffersError` unless names and values of all parameters and buffers agree."""
    ours, theirs = dict(_tensors(student)), dict(_tensors(teacher))
    for name in sorted(ours.keys() ^ theirs.keys()):
        raise TeacherDiffersError(f"{name} is only in the {'student' if name in ours else 'teacher'}")
    for name, tensor in ours.items():
        if not torch.equal(tensor, theirs[name]):
            raise TeacherDiffersError(f"teacher.{name} does not start equal to the student's")


def stochastic_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, module and the attribute with its rate, of all that drops at random: ours, timm's, torchvision's, torch's.

    Found by class name, since importing timm or torchvision to ask takes seconds.
    """
    attributes = {"DropPath": "drop_prob", "DropBlock2d": "drop_prob", "StochasticDepth": "p"}
    for name, module in network.named_modules():
        for kind in type(module).__mro__:
            attribute = "p" if kind is nn.modules.dropout._DropoutNd else attributes.get(kind.__name__)
            if attribute is not None:
                yield name, module, attribute
                break


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def _storage(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr() or id(tensor)
