"""Multi-head self-attention on the tokens of several batches at once.

Shapes: N images and T tokens of one batch, class token first, R = sum of N * T over the batches, M = sum of N; D
features, h heads, d = D / h.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dino.linear import Linear, linear, type_of_products


class Sequences(NamedTuple):
    """Some of the rows of a token matrix: the tokens of one batch, image by image."""

    num_images: int  # N
    length: int  # T


Layout = Sequence[Sequences]


def packed(batches: Sequence[Tensor]) -> tuple[Tensor, Layout]:
    """Tokens `[N_i, T_i, D]` as one matrix `[R, D]`, and which rows are whose."""
    layout = [Sequences(tokens.shape[0], tokens.shape[1]) for tokens in batches]  # not len: torch.export fixes that
    rows = [tokens.flatten(0, 1) for tokens in batches]
    return rows[0] if len(rows) == 1 else torch.cat(rows), layout


def unpacked(rows: Tensor, layout: Layout) -> list[Tensor]:
    """`[R, X]` -> `[N_i, T_i, X]`."""
    # One batch of any number of images, which a split would fix. Only there: a compiled run must stay one that resumes
    # exactly, and without the split in evaluation it is not (tests/test_survival.py).
    if torch.compiler.is_exporting():
        return [rows.view(layout[0].num_images, layout[0].length, -1)]
    parts = torch.split(rows, [images * length for images, length in layout])
    return [part.view(images, length, -1) for part, (images, length) in zip(parts, layout, strict=True)]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(embed_dim, 3 * embed_dim)
        self.proj = Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """`[R, D]` -> `[R, D]`."""
        qkv = self.qkv(tokens)
        if qkv.device.type == "cuda":
            split = [_by_head(part, self.num_heads) for part in unpacked(qkv, layout)]
            mixed = [F.scaled_dot_product_attention(*one).transpose(1, 2).flatten(2) for one in split]
            together, _ = packed(mixed)
        else:
            together = self.mix(qkv, layout)
        projected: Tensor = self.proj(together)
        return projected

    def mix(self, qkv: Tensor, layout: Layout) -> Tensor:
        """softmax(q k^T / sqrt(d)) v of every batch: `[R, 3 D]` -> `[R, D]`."""
        if torch.compiler.is_exporting():
            return _mix(qkv, layout, self.num_heads)[0]
        if torch.compiler.is_compiling():
            numbers = [number for of_one in layout for number in of_one]
            made: list[Tensor] = _mixed_and_kept(qkv, numbers, self.num_heads)
            return made[0]
        mixed: Tensor = _Mixed.apply(qkv, layout, self.num_heads)
        return mixed

    def of_class_tokens(self, tokens: Tensor, layout: Layout) -> Tensor:
        """`[R, D]` -> what `forward` makes of the class tokens, `[M, D]`, without keys and values of the others.

        With one query of an image, q . (W_k x) = (W_k^T q) . x and sum a (W_v x) = W_v (sum a x), since weights sum to
        1; the keys' bias adds the same to all scores.
        """
        heads, width = self.num_heads, self.qkv.in_features // self.num_heads
        of_query, of_key, of_value = torch.unflatten(self.qkv.weight, 0, (3, heads, width))  # [h, d, D]
        query_bias, _, value_bias = torch.unflatten(self.qkv.bias, 0, (3, heads, width))  # [h, d]
        batches = unpacked(tokens, layout)
        first = torch.cat([batch[:, 0] for batch in batches])
        query = linear(first, of_query.flatten(0, 1), query_bias.flatten()) * width**-0.5
        query = torch.bmm(torch.unflatten(query, 1, (heads, width)).transpose(0, 1), of_key)  # [h, M, D]
        asking = torch.split(query.transpose(0, 1), [images for images, _ in layout])
        dtype = type_of_products(tokens)
        weighted = [_averaged(one, batch, dtype) for one, batch in zip(asking, batches, strict=True)]
        mixed = torch.bmm(torch.cat(weighted).transpose(0, 1), of_value.transpose(1, 2))  # [h, M, d]
        projected: Tensor = self.proj((mixed.transpose(0, 1) + value_bias).flatten(1))
        return projected

    def weights(self, tokens: Tensor, layout: Layout) -> list[Tensor]:
        """`[R, D]` -> softmax(q k^T / sqrt(d)) of every batch, `[N, h, T, T]` each; rows sum to 1."""
        split = [_by_head(part, self.num_heads) for part in unpacked(self.qkv(tokens), layout)]
        return [(query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)).softmax(dim=-1) for query, key, _ in split]


class _Kept(NamedTuple):
    """Of one batch, all heads of an image below each other."""

    of_heads: Tensor  # query, key, value: [3, N h, T, d]
    weights: Tensor  # [N h, T, T], after softmax


def _mix(qkv: Tensor, layout: Layout, num_heads: int) -> tuple[Tensor, list[Tensor]]:
    """`[R, 3 D]` -> softmax(q k^T / sqrt(d)) v of every batch, `[R, D]`, and `_Kept` of all; without gradient."""
    mixed = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    kept: list[Tensor] = []
    with torch.autocast(qkv.device.type, enabled=False):
        for part, place in zip(unpacked(qkv, layout), unpacked(mixed, layout), strict=True):
            of_heads = _copied(_by_head(part, num_heads), _type_of_attention(part, part.dtype)).flatten(1, 2)
            query, key, value = of_heads
            weights = _scaled(query, key.transpose(1, 2), query.shape[-1] ** -0.5).softmax(dim=-1)
            _put(torch.bmm(weights, value), torch.unflatten(place, -1, (num_heads, -1)).transpose(1, 2))
            kept += _Kept(of_heads, weights)
    return mixed, kept


def _mix_backward(gradient: Tensor, kept: Sequence[Tensor], layout: Layout, num_heads: int) -> Tensor:
    """`[R, D]` -> `[R, 3 D]`: by hand, since each part then is copied once, to where it belongs in the matrix."""
    of_qkv = gradient.new_empty(gradient.shape[0], 3 * gradient.shape[1])
    of_batches = [_Kept(*kept[i : i + 2]) for i in range(0, len(kept), 2)]
    parts = unpacked(gradient, layout), unpacked(of_qkv, layout)
    for ((query, key, value), weights), given, place in zip(of_batches, *parts, strict=True):
        of_query, of_key, of_value = _by_head(place, num_heads)
        scale, dtype = query.shape[-1] ** -0.5, weights.dtype
        of_mixed = _copied(torch.unflatten(given, -1, (num_heads, -1)).transpose(1, 2), dtype).flatten(0, 1)
        _put(torch.bmm(weights.transpose(1, 2), of_mixed), of_value)
        of_weights = torch.bmm(of_mixed, value.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, dtype)
        del of_weights  # as large as the scores of all heads
        _put(_scaled(of_scores, key, scale), of_query)
        _put(_scaled(of_scores.transpose(1, 2), query, scale), of_key)
    return of_qkv


def _averaged(queries: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax(q x^T) x, of products in `dtype`: `[N, h, D]`, `[N, T, D]` -> `[N, h, D]`."""
    kind = _type_of_attention(tokens, dtype)
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = tokens.to(kind)
        weights = torch.bmm(queries.to(kind), tokens.transpose(1, 2)).softmax(dim=-1)
        return torch.bmm(weights, tokens)


def _type_of_attention(tokens: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which to mix tokens `[N, T, X]`, where other products are made in `dtype`. On a CPU products of few tokens are
    no faster in bf16 than in float32, and the softmax of short rows is slower, as torch takes them number by number."""
    is_short = dtype == torch.bfloat16 and tokens.device.type == "cpu" and tokens.shape[1] < 32
    return torch.float32 if is_short else dtype


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, in one visit."""
    return tensor.new_empty(tensor.shape, dtype=dtype).copy_(tensor)


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left right, batch by batch; the products are scaled before they are rounded."""
    return torch.baddbmm(left.new_zeros(1, 1, 1), left, right, beta=0, alpha=scale)


def _by_head(qkv: Tensor, num_heads: int) -> Tensor:
    """`[N, T, 3 D]` -> query, key, value, `[3, N, h, T, d]`, a view."""
    return torch.unflatten(qkv, -1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)


def _put(of_heads: Tensor, place: Tensor) -> None:
    """`[N h, T, X]` into `[N, h, T, X]`."""
    place.copy_(of_heads.view_as(place))


class _Mixed(torch.autograd.Function):
    """`_mix` with a gradient."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: Layout, num_heads: int) -> Tensor:
        mixed, kept = _mix(qkv, layout, num_heads)
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.num_heads = layout, num_heads
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _mix_backward(gradient, ctx.saved_tensors, ctx.layout, ctx.num_heads), None, None


# The same as operations that torch.compile takes as they are: what it makes of the copies and the softmax is slower on
# a CPU, and so is leaving the compiled block for them. Uncompiled, such an operation costs more than a Function. What
# was compiled is kept on the disk under their names: if one ever returns other shapes, it needs another name.


def _layout(numbers: Sequence[int]) -> Layout:
    """Of `[N_1, T_1, N_2, T_2, ...]`, since operations take plain numbers."""
    return [Sequences(*numbers[i : i + 2]) for i in range(0, len(numbers), 2)]


@torch.library.custom_op("dino::attention", mutates_args=())
def _mixed_and_kept(qkv: Tensor, layout: Sequence[int], num_heads: int) -> list[Tensor]:
    mixed, kept = _mix(qkv, _layout(layout), num_heads)
    return [mixed, *kept]


@_mixed_and_kept.register_fake
def _(qkv: Tensor, layout: Sequence[int], num_heads: int) -> list[Tensor]:
    num_features = qkv.shape[1] // 3
    made = [qkv.new_empty(qkv.shape[0], num_features)]
    for tokens in unpacked(qkv, _layout(layout)):
        images, length, _ = tokens.shape
        for shape in ((3, images * num_heads, length, num_features // num_heads), (images * num_heads, length, length)):
            made.append(tokens.new_empty(shape, dtype=_type_of_attention(tokens, tokens.dtype)))
    return made


@torch.library.custom_op("dino::attention_backward", mutates_args=())
def _of_qkv(gradient: Tensor, kept: Sequence[Tensor], layout: Sequence[int], num_heads: int) -> Tensor:
    return _mix_backward(gradient, kept, _layout(layout), num_heads)


@_of_qkv.register_fake
def _(gradient: Tensor, kept: Sequence[Tensor], layout: Sequence[int], num_heads: int) -> Tensor:
    return gradient.new_empty(gradient.shape[0], 3 * gradient.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Sequence[int], int], output: list[Tensor]) -> None:
    _, ctx.layout, ctx.num_heads = inputs
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Tensor, None, None]:
    return _of_qkv(gradients[0], ctx.saved_tensors, ctx.layout, ctx.num_heads), None, None


_mixed_and_kept.register_autograd(_backward, setup_context=_keep)
