"""Networks that are divided among the ranks: each keeps a part of every parameter, and of what belongs to it.

`torch.distributed.fsdp.fully_shard` gathers the parameters of one block where it is computed and frees them after. What
changes parameters (clipping, optimizer, EMA) works on the parts alone, as plain tensors in modules of the same names,
so that it needs no form of its own. Checkpoints hold whole tensors, the same as without sharding.

Shapes: D0 the first dimension of a parameter, which is the one that is divided.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dino import ranks
from dino.backbone.sync_batch_norm import convert_sync_batch_norm
from dino.model import StudentTeacher
from dino.runtime import Precision

State = dict[str, Any]


def divide(model: StudentTeacher, precision: Precision) -> "Shards":
    """Divides student and teacher, whose blocks go to the device one by one; returns what is of this rank.

    Raises:
        ValueError: in fp16, whose scale each rank would choose by its own parts.
    """
    if precision.name == "fp16":
        raise ValueError("trainer.parallel=fsdp: not in fp16; use trainer.precision=bf16 or fp32, or parallel=ddp")
    for network in (model.student, model.teacher):
        convert_sync_batch_norm(network, precision.device)
    return Shards(model, precision.device)


class Shards:
    """This rank's parts of a student and its teacher, which are sharded by making this.

    Attributes:
        student, teacher: modules whose parameters are the parts, by the names of the whole; buffers are shared.
    """

    def __init__(self, model: StudentTeacher, device: torch.device) -> None:
        self._model = model
        self._structure = copy.deepcopy(model).to("meta")
        # Nobody writes into the views of prototypes that the head returns.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        mesh = init_device_mesh(device.type, (ranks.world_size(),))
        for network in (model.student, model.teacher):
            for block in _blocks(network.backbone):
                fully_shard(block, mesh=mesh)
            # The last layer is needed until the loss has been taken: what is no block stays whole until the backward.
            fully_shard(network, mesh=mesh, reshard_after_forward=False)
            for module in _sharded_modules(network):
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot average
        self.student = _like(model.student, _part)
        self.teacher = _like(model.teacher, _part)
        model.register_state_dict_post_hook(_make_whole)  # type: ignore[no-untyped-call]
        model.register_load_state_dict_pre_hook(_divide)  # type: ignore[no-untyped-call]

    def accumulate(self, last: bool) -> None:
        """Whether the next backward pass is the last of a step, in which gradients of the ranks are averaged."""
        self._model.student.set_requires_gradient_sync(last)  # type: ignore[operator]  # of FSDPModule

    def take_gradients(self) -> None:
        """After the last backward pass: gradients become those of the parts, and whole parameters are freed."""
        for network in (self._model.student, self._model.teacher):
            network.reshard()  # type: ignore[operator]  # of FSDPModule; otherwise the next step would use them again
        for part, parameter in zip(self.student.parameters(), self._model.student.parameters(), strict=True):
            part.grad = None if parameter.grad is None else _part_of(parameter.grad)
            parameter.grad = None

    def student_with_gradients(self) -> nn.Module:
        """A module whose parameters have the whole gradients of the parts, for statistics. All ranks call it."""

        def with_gradient(parameter: nn.Parameter) -> nn.Parameter:
            gradient = parts[id(parameter)].grad
            if gradient is None:
                return nn.Parameter(torch.empty(0))
            twin = nn.Parameter(_whole(gradient, parameter))
            twin.grad = twin.data
            return twin

        parts = dict(zip(map(id, self._model.student.parameters()), self.student.parameters(), strict=True))
        return _like(self._model.student, with_gradient)

    def gather_prototypes(self) -> None:
        """After a backward pass: the last layer of the student is whole once more. All ranks call it."""
        self._model.student.unshard()  # type: ignore[operator]  # of FSDPModule

    def whole_model(self) -> StudentTeacher:
        """A copy of both networks, whole on every rank: evaluations differ from rank to rank."""
        device = next(self.student.parameters()).device
        whole = copy.deepcopy(self._structure).to_empty(device=device)
        with torch.no_grad():
            for target, source in zip(whole.parameters(), self._model.parameters(), strict=True):
                target.copy_(source.full_tensor())  # type: ignore[attr-defined]  # of DTensor
            for buffer, own in zip(whole.buffers(), self._model.buffers(), strict=True):
                buffer.copy_(own)
        return whole

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on the state of the optimizer is whole where it is saved and loaded."""
        sharded = dict(zip(map(id, self.student.parameters()), self._model.student.parameters(), strict=True))
        order = [sharded[id(part)] for group in optimizer.param_groups for part in group["params"]]

        def change(state: State, how: Callable[[Tensor, nn.Parameter], Tensor]) -> State:
            changed = {
                index: {
                    name: how(value, order[index]) if isinstance(value, Tensor) and value.ndim else value
                    for name, value in of_parameter.items()
                }
                for index, of_parameter in state["state"].items()
            }
            return {**state, "state": changed}

        optimizer.register_state_dict_post_hook(lambda _, state: change(state, lambda *both: _for_main(_whole(*both))))
        optimizer.register_load_state_dict_pre_hook(lambda _, state: change(state, _own_part))


# ---------------------------------------------------------------------- modules


def _blocks(backbone: nn.Module) -> Iterator[nn.Module]:
    """The items of the outermost lists of modules: blocks of a transformer, or of the stages of other networks."""
    for child in backbone.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)


def _sharded_modules(network: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in network.modules() if isinstance(module, FSDPModule))


def _like(module: nn.Module, change: Callable[[nn.Parameter], nn.Parameter]) -> nn.Module:
    """Modules without a forward pass that have the names of `module`, changed parameters and the same buffers."""
    twin = nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        twin.register_parameter(name, change(parameter))
    for name, buffer in module.named_buffers(recurse=False):
        twin.register_buffer(name, buffer)
    for name, child in module.named_children():
        twin.add_module(name, _like(child, change))
    return twin


# ---------------------------------------------------------------------- parts and wholes


def _part(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(_part_of(parameter.detach()), requires_grad=parameter.requires_grad)


def _part_of(tensor: Tensor) -> Tensor:
    """What lies in the memory of this rank."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _whole(part: Tensor, like: Tensor) -> Tensor:
    """Parts [D0 / ranks, ...] of something that is divided as `like` -> [D0, ...]. All ranks call it."""
    assert isinstance(like, DTensor)
    placed = DTensor.from_local(part, like.device_mesh, [Shard(0)], shape=like.shape, stride=like.stride())
    return placed.full_tensor()


def _own_part(whole: Tensor, like: Tensor) -> Tensor:
    """[D0, ...] -> this rank's part of it, divided as `like`."""
    assert isinstance(like, DTensor)
    count, rank = like.device_mesh.size(), ranks.rank()
    chunks = whole.chunk(count)
    return chunks[rank].clone() if rank < len(chunks) else whole[:0].clone()


def _for_main(whole: Tensor) -> Tensor:
    """On the host of rank 0, which writes checkpoints; nothing on the others."""
    return whole.cpu() if ranks.rank() == 0 else whole.new_empty(0)


def _make_whole(module: nn.Module, state: State, prefix: str, _: Any) -> None:
    """Everything of `state` as plain tensors, on rank 0 alone. All ranks call it."""
    for name, value in state.items():
        if isinstance(value, DTensor):
            state[name] = _for_main(value.full_tensor())


def _divide(module: nn.Module, state: State, prefix: str, *_: Any) -> None:
    """Plain tensors become parts where the module has parts."""
    for name, parameter in module.named_parameters():
        key = f"{prefix}{name}"
        if isinstance(parameter, DTensor) and key in state and not isinstance(state[key], DTensor):
            whole = state[key].to(parameter.device)
            if whole.shape == parameter.shape:  # otherwise loading says what is wrong
                state[key] = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
