"""The blocks of a vision transformer, on the tokens of several batches at once.

Tokens of all batches are the rows of one matrix for everything that looks at one token at a time; attention takes each
batch by itself.

Shapes: N images and T tokens of one batch, class token first, R = sum of N * T over the batches, D features.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# What of a network is made again in the backward pass rather than kept: nothing, its largest part, or all that can be.
Recompute = Literal["nothing", "part", "all"]


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


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and in a residual branch with stochastic depth."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.drop_path = DropPath(drop_path_rate)  # one rate; each branch draws anew
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = MLP(embed_dim, int(embed_dim * mlp_ratio))

    def run(
        self, tokens: Tensor, layout: Layout, class_tokens_only: bool = False, recompute: Recompute = "nothing"
    ) -> Tensor:
        """`[R, D]` -> `[R, D]`, or only its class tokens, `[sum N, D]`; draws which images drop a branch.

        Drawn here and not in `forward`: so that may be compiled and run again, and blocks differ in weights alone.
        """
        rows = [Sequences(images, 1) for images, _ in layout] if class_tokens_only else layout
        scales = self.drop_path(rows, tokens), self.drop_path(rows, tokens)
        arguments = (tokens, layout, *scales, class_tokens_only, recompute == "part")
        if recompute == "all" and torch.is_grad_enabled():
            output: Tensor = checkpoint(self, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            output = self(*arguments)
        return output

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        attention_scales: Tensor | None,
        mlp_scales: Tensor | None,
        class_tokens_only: bool,
        recompute_mlp: bool,
    ) -> Tensor:
        """As `run`, with the scales of the branches' rows, `[R, 1]` or `[sum N, 1]`; None: 1."""
        branch = self.attn(self.norm1(tokens), layout, class_tokens_only)
        if class_tokens_only:
            tokens = torch.cat([part[:, 0] for part in unpacked(tokens, layout)])
        tokens = _added(tokens, branch, attention_scales)
        if recompute_mlp and torch.is_grad_enabled():
            branch = checkpoint(self._mlp_branch, tokens, use_reentrant=False, preserve_rng_state=False)
        else:
            branch = self._mlp_branch(tokens)
        return _added(tokens, branch, mlp_scales)

    def _mlp_branch(self, tokens: Tensor) -> Tensor:
        branch: Tensor = self.mlp(self.norm2(tokens))
        return branch


def _added(tokens: Tensor, branch: Tensor, scales: Tensor | None) -> Tensor:
    """tokens + scales * branch, in the type of the tokens."""
    return tokens + branch if scales is None else torch.addcmul(tokens, branch.to(tokens.dtype), scales)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def split_heads(self, tokens: Tensor, layout: Layout) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`[R, D]` -> query, key, value of every batch, `[N, heads, T, D / heads]` each."""
        batches = unpacked(self.qkv(tokens), layout)
        shape = (3, self.num_heads, -1)
        split = [torch.unflatten(part, -1, shape).permute(2, 0, 3, 1, 4) for part in batches]
        return [(query, key, value) for query, key, value in split]

    def forward(self, tokens: Tensor, layout: Layout, class_tokens_only: bool = False) -> Tensor:
        """`[R, D]` -> `[R, D]`, or only what the class tokens become, `[sum N, D]`."""
        mixed = []
        for query, key, value in self.split_heads(tokens, layout):
            asking = query[:, :, :1] if class_tokens_only else query
            mixed.append(attention(asking, key, value).transpose(1, 2).flatten(2).flatten(0, 1))
        projected: Tensor = self.proj(mixed[0] if len(mixed) == 1 else torch.cat(mixed))
        return projected


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: `[N, heads, T', d]`, `[N, heads, T, d]` twice -> `[N, heads, T', d]`."""
    if query.device.type == "cuda":
        return F.scaled_dot_product_attention(query, key, value)
    return attention_weights(query, key) @ value  # faster on a CPU in bf16: benchmarks/step.py, lightly with either


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)): `[N, heads, T', d]`, `[N, heads, T, d]` -> `[N, heads, T', T]`."""
    scores: Tensor = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1)


class MLP(nn.Module):
    """Two linear layers around an exact GELU, token by token."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[R, D]` -> `[R, D]`."""
        projected: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return projected


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's residual branch is zero with probability `drop_prob`, else scaled up.

    The branch is computed for the dropped images too: leaving them out takes copies of the tokens, and shapes that
    change at every step.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, layout: Layout, tokens: Tensor) -> Tensor | None:
        """What the rows of a branch are multiplied with, `[R, 1]`, one draw per image; None: 1."""
        if self.drop_prob == 0 or not self.training:
            return None
        keep = 1 - self.drop_prob
        per_image = tokens.new_empty(sum(images for images, _ in layout), dtype=torch.float32)
        # bernoulli_, since comparing uniform numbers in bf16, as floor(keep + rand) does, would round the rate.
        parts = torch.split(per_image.bernoulli_(keep).div_(keep), [images for images, _ in layout])
        scales = [part[:, None].expand(-1, length).flatten() for part, (_, length) in zip(parts, layout, strict=True)]
        return torch.cat(scales)[:, None].to(tokens.dtype)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"
