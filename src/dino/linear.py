"""Linear layers by the library that multiplies fastest: on a CPU that is oneDNN, whichever torch would take.

torch leaves float32 to MKL, which takes twice the time on an AMD CPU, and adds the bias of bf16 products in a visit of
its own (benchmarks/layers.py has both beside torch's). Elsewhere, and for other types, these are torch's own.

Shapes: N rows, D inputs, K outputs.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

HAS_ONEDNN: Final[bool] = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
HAS_BF16: Final[bool] = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
MANY_ROWS: Final = 4096  # from which oneDNN makes a convolution by single pixels faster than the same product
MANY_NUMBERS: Final = 2**20  # from which their sums in bf16 take longer than a product with ones


class Linear(nn.Linear):
    """As `torch.nn.Linear`, `[N, D]` -> `[N, K]`."""

    def forward(self, rows: Tensor) -> Tensor:
        return linear(rows, self.weight, self.bias)


def linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`[N, D]`, `[K, D]`, `[K]` -> rows weight^T + bias, `[N, K]`, in the type of autocast where that is on."""
    assert rows.ndim == 2
    dtype = type_of_products(rows)
    if not _by_onednn(rows.device, dtype):
        return F.linear(rows, weight, bias)
    products: Tensor = _Linear.apply(rows, weight, bias, dtype)
    return products


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[N, D]`, `[K, D]` of one type, `[K]` -> `[N, K]` in that type, also inside autocast; without gradient."""
    if not _by_onednn(rows.device, rows.dtype):
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(rows, weight, None if bias is None else bias.to(rows.dtype))
    return _compiled_product(rows, weight, bias) if torch.compiler.is_compiling() else _product(rows, weight, bias)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if len(rows) >= MANY_ROWS:
        bias = None if bias is None else bias.to(rows.dtype)
        pixels = torch.mkldnn_convolution(_as_image(rows), weight[:, :, None, None], bias, [0, 0], [1, 1], [1, 1], 1)
        return pixels[0, :, 0].T
    products: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return products


# torch.compile has plans of its own with that operation, for weights that are constant; of this one it knows nothing.
_compiled_product = torch.library.custom_op("dino::product", _product, mutates_args=())


@_compiled_product.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


def type_of_products(tensor: Tensor) -> torch.dtype:
    """Of products with this tensor: that of autocast, where it is on and lowers the tensor's type; else its own."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _by_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    has_type = (dtype == torch.float32 and HAS_ONEDNN) or (dtype == torch.bfloat16 and HAS_BF16)
    return has_type and device.type == "cpu" and not torch.compiler.is_exporting()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.types = rows.dtype, weight.dtype, bias.dtype
        rows, weight = rows.to(dtype), weight.to(dtype)
        of_rows, of_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(rows if of_weight else None, weight if of_rows else None)
        return product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_rows, of_weight, of_bias, _ = ctx.needs_input_grad
        return (
            _rows_gradient(gradient, weight).to(ctx.types[0]) if of_rows else None,
            _weight_gradient(gradient, rows).to(ctx.types[1]) if of_weight else None,
            _sum_of_rows(gradient).to(ctx.types[2]) if of_bias else None,
            None,
        )


def _rows_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient weight: `[N, K]`, `[K, D]` -> `[N, D]`."""
    if gradient.dtype == torch.bfloat16 and len(gradient) < MANY_ROWS:
        return gradient @ weight
    return product(gradient, weight.T.contiguous())


def _weight_gradient(gradient: Tensor, rows: Tensor) -> Tensor:
    """gradient^T rows: `[N, K]`, `[N, D]` -> `[K, D]`."""
    if gradient.dtype == torch.bfloat16:
        return gradient.T @ rows
    # That of a convolution by single pixels: the only one of oneDNN that takes float32 as it lies here.
    weight = rows.new_empty(()).expand(gradient.shape[1], rows.shape[1], 1, 1)
    one_pixel = ([0], [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    images = _as_image(gradient), _as_image(rows)
    _, found, _ = torch.ops.aten.convolution_backward(*images, weight, *one_pixel, [False, True, False])
    of_weight: Tensor = found[:, :, 0, 0]
    return of_weight


def _sum_of_rows(gradient: Tensor) -> Tensor:
    """`[N, K]` -> `[K]`; of much bf16 as a product, as torch's own sum of it is slow."""
    if gradient.dtype == torch.bfloat16 and gradient.numel() >= MANY_NUMBERS:
        return (gradient.new_ones(1, len(gradient)) @ gradient)[0]
    return gradient.sum(dim=0)


def _as_image(rows: Tensor) -> Tensor:
    """`[N, X]` -> an image of N pixels in a row, X channels, channels last: `[1, X, 1, N]`."""
    return rows[None, None].permute(0, 3, 1, 2)
