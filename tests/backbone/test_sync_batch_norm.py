"""Batch norm over ranks: two of 8 images are one process with 16, forward and backward."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from dino import ranks
from dino.backbone import ConvolutionalBackbone
from dino.backbone.sync_batch_norm import convert_sync_batch_norm

RunRanks = Callable[..., list[Any]]

CPU = torch.device("cpu")


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 + 2 * torch.randn(16, *shape, generator=generator, dtype=torch.float64)


def norm(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, **options), nn.ReLU())


def with_activation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), BatchNormAct2d(5))


def of_rows() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6), nn.BatchNorm1d(6), nn.GELU())


def resnet() -> nn.Module:
    return ConvolutionalBackbone(architecture="resnet18", channels=3, stem="small")


def train_twice(module: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Two forward and backward passes with a loss that is a sum over images, and a pass in evaluation mode."""
    batch = batch.clone().requires_grad_()
    for _ in range(2):
        output = module(batch)
        weights = torch.linspace(0.5, 1.5, output[0].numel(), dtype=output.dtype).view_as(output[0])
        (output * weights).square().sum().backward()
    found = {"output": output.detach(), "input gradient": batch.grad}
    found |= {f"gradient of {name}": ranks.sum_over_ranks(value.grad) for name, value in module.named_parameters()}
    found |= {name: value.clone() for name, value in module.named_buffers()}
    if any(name.endswith("running_mean") for name in found):  # otherwise it takes the statistics of the batch at hand
        found["evaluated"] = module.eval()(batch).detach()
    return found


@pytest.mark.parametrize(
    "make",
    [
        norm,
        lambda: norm(momentum=None),
        lambda: norm(affine=False),
        lambda: norm(track_running_stats=False),
        with_activation,
        of_rows,
        resnet,
    ],
    ids=["plain", "cumulative", "not-affine", "untracked", "activation", "rows", "resnet18"],
)
def test_two_ranks_of_8_equal_one_process_with_16(run_ranks: RunRanks, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make().double()
    batch = images(3, 8, 8)

    def half() -> dict[str, Any]:
        found = train_twice(convert_sync_batch_norm(module, CPU), batch.chunk(2)[ranks.rank()])
        return {name: value.numpy() for name, value in found.items()}

    one, other = run_ranks(half, 2)
    for name, expected in train_twice(copy.deepcopy(module), batch).items():
        parts = [torch.from_numpy(found[name]) for found in (one, other)]
        if name in ("output", "input gradient", "evaluated"):
            parts = [torch.cat(parts)]
        for part in parts:
            torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-10)


def test_unequal_batches_weigh_by_their_images(run_ranks: RunRanks) -> None:
    module = nn.BatchNorm2d(3).double()
    batch = images(3, 4, 4)

    def part() -> Any:
        return convert_sync_batch_norm(module, CPU)(batch.split([3, 13])[ranks.rank()]).detach().numpy()

    found = torch.cat([torch.from_numpy(part) for part in run_ranks(part, 2)])
    torch.testing.assert_close(found, module(batch).detach(), rtol=1e-10, atol=1e-12)


def test_half_precision_is_normalised_in_float32(run_ranks: RunRanks) -> None:
    batch = images(3, 4, 4).bfloat16()

    def part() -> tuple[str, Any]:
        found = convert_sync_batch_norm(nn.BatchNorm2d(3), CPU)(batch.chunk(2)[ranks.rank()])
        return str(found.dtype), found.detach().float().numpy()

    results = run_ranks(part, 2)
    assert [dtype for dtype, _ in results] == ["torch.bfloat16"] * 2
    found = torch.cat([torch.from_numpy(values) for _, values in results])
    torch.testing.assert_close(found, nn.BatchNorm2d(3)(batch).detach().float(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("make", [norm, with_activation, of_rows, resnet])
def test_a_single_process_computes_what_it_did_before(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make().double()
    before = copy.deepcopy(module)
    parameters = list(module.parameters())
    converted = convert_sync_batch_norm(module, CPU)
    assert [id(one) for one in converted.parameters()] == [id(one) for one in parameters]
    assert converted.state_dict().keys() == before.state_dict().keys()
    expected = train_twice(before, images(3, 8, 8))
    for name, value in train_twice(converted, images(3, 8, 8)).items():
        assert torch.equal(value, expected[name]), name


def test_a_block_alone_does_not_wait_for_the_others(run_ranks: RunRanks) -> None:
    batch = images(3, 4, 4)

    def only_rank_0() -> Any:
        module = convert_sync_batch_norm(nn.BatchNorm2d(3).double(), CPU)
        if ranks.rank() == 0:
            with ranks.alone():
                return module(batch).detach().numpy()
        return None

    found, _ = run_ranks(only_rank_0, 2)
    assert torch.equal(torch.from_numpy(found), nn.BatchNorm2d(3).double()(batch).detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_normalises_as_before_in_a_single_process() -> None:
    module = nn.BatchNorm2d(3).cuda()
    expected = copy.deepcopy(module)(images(3, 4, 4).float().cuda())
    assert torch.equal(convert_sync_batch_norm(module, torch.device("cuda"))(images(3, 4, 4).float().cuda()), expected)
