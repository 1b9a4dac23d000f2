"""Our linear layers are torch's: in value, gradient and type, and no less exact, whoever multiplies."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dino.linear import HAS_BF16, HAS_ONEDNN, MANY_NUMBERS, MANY_ROWS, Linear, linear, product

# (rows, inputs, outputs): one row, odd sizes, more rows, so many that a convolution makes the product, and so many
# numbers that a product makes the sum.
SHAPES = [(1, 3, 2), (37, 24, 17), (1030, 64, 192), (MANY_ROWS + 3, 24, 17), (MANY_ROWS, 24, MANY_NUMBERS // MANY_ROWS)]


@dataclass(frozen=True)
class Results:
    output: Tensor
    gradients: list[Tensor]  # of rows, weight and bias


def made(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Rows (every second column of a wider matrix, so not contiguous), weight, bias and the gradient of the output."""
    num_rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(num_rows, 2 * inputs), (outputs, inputs), (outputs,), (num_rows, outputs)]
    rows, *others = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return [rows[:, ::2], *others]


def run(function: type[Linear] | object, tensors: list[Tensor], autocast: bool = False) -> Results:
    rows, weight, bias, gradient = tensors
    inputs = [tensor.detach().requires_grad_() for tensor in (rows, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = function(*inputs)  # type: ignore[operator]
    gradients = torch.autograd.grad(output, inputs, gradient.to(output.dtype))
    return Results(output.detach(), list(gradients))


def distances(found: Results, exact: Results) -> list[float]:
    pairs = zip([found.output, *found.gradients], [exact.output, *exact.gradients], strict=True)
    return [float((own.double() - other).norm() / other.norm()) for own, other in pairs]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_as_exact_as_torch(shape: tuple[int, int, int], dtype: torch.dtype, threads: int) -> None:
    tensors = made(shape, dtype)
    exact = run(F.linear, [tensor.double() for tensor in tensors])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, expected = run(linear, tensors), run(F.linear, tensors)
    finally:
        torch.set_num_threads(before)
    assert found.output.dtype == dtype
    assert [gradient.dtype for gradient in found.gradients] == [dtype] * 3
    for ours, theirs in zip(distances(found, exact), distances(expected, exact), strict=True):
        assert ours < 1.2 * theirs + 8 * torch.finfo(dtype).eps  # sums of thousands, in another order


@pytest.mark.skipif(not HAS_ONEDNN, reason="torch without oneDNN")
def test_onednn_multiplies_what_it_can() -> None:
    for dtype, it_can in ((torch.float32, True), (torch.bfloat16, HAS_BF16), (torch.float64, False)):
        rows, weight, bias, _ = made((37, 24, 17), dtype)
        assert (type(linear(rows, weight.requires_grad_(), bias).grad_fn).__name__ == "_LinearBackward") == it_can


@pytest.mark.parametrize("shape", SHAPES)
def test_autocast_is_no_further_from_float64_than_that_of_torch(shape: tuple[int, int, int]) -> None:
    tensors = made(shape, torch.float32)
    exact = run(F.linear, [tensor.double() for tensor in tensors])
    found, expected = run(linear, tensors, autocast=True), run(F.linear, tensors, autocast=True)
    assert found.output.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in found.gradients] == [torch.float32] * 3
    for ours, theirs in zip(distances(found, exact), distances(expected, exact), strict=True):
        assert ours < 1.1 * theirs + 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_only_what_is_asked_for_has_a_gradient(dtype: torch.dtype) -> None:
    layer = Linear(4, 3).to(dtype)
    layer.weight.requires_grad_(False)
    rows = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    layer(rows).sum().backward()  # with a gradient that is one number, expanded
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, 5))
    torch.testing.assert_close(rows.grad, layer.weight.sum(dim=0).expand(5, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_product_keeps_its_type_inside_autocast(dtype: torch.dtype) -> None:
    rows, weight, bias, _ = made((37, 24, 17), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = product(rows, weight, bias), product(rows, weight)
    for own, expected in zip(found, (F.linear(rows, weight, bias), F.linear(rows, weight)), strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own, expected)


@pytest.mark.slow  # compiles
def test_compiled_it_is_the_same() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = made((MANY_ROWS, 24, 17), dtype)
        compiled = torch.compile(linear, fullgraph=True)
        found, expected = run(compiled, tensors), run(linear, tensors)
        rtol = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.output, expected.output, rtol=rtol, atol=rtol)
        torch.testing.assert_close(found.gradients, expected.gradients, rtol=rtol, atol=rtol)
