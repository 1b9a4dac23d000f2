"""The blocks of a vision transformer, on the tokens of several batches at once.

Tokens of all batches are the rows of one matrix for everything that looks at one token at a time; attention takes each
batch by itself.

Shapes: N images and T tokens of one batch, class token first, R = sum of N * T over the batches, D features.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dino.backbone.attention import Attention, Layout, Sequences, unpacked
from dino.linear import Linear

# What of a network is made again in the backward pass rather than kept: nothing, its largest part, or all that can be.
Recompute = Literal["nothing", "part", "all"]


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
        normed = self.norm1(tokens)
        if class_tokens_only:
            branch = self.attn.of_class_tokens(normed, layout)
            tokens = torch.cat([part[:, 0] for part in unpacked(tokens, layout)])
        else:
            branch = self.attn(normed, layout)
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


class MLP(nn.Module):
    """Two linear layers around an exact GELU, token by token."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(embed_dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[R, D]` -> `[R, D]`."""
        projected: Tensor = self.fc2(gelu(self.fc1(tokens)))
        return projected


def gelu(values: Tensor) -> Tensor:
    """Exact GELU: on a CPU torch's own in compiled blocks too, as what torch.compile makes of it is slower there."""
    if values.device.type == "cpu" and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        kept_whole: Tensor = _gelu(values)
        return kept_whole
    return F.gelu(values)


@torch.library.custom_op("dino::gelu", mutates_args=())
def _gelu(values: Tensor) -> Tensor:
    return F.gelu(values)


@torch.library.custom_op("dino::gelu_backward", mutates_args=())
def _gelu_backward(gradient: Tensor, values: Tensor) -> Tensor:
    of_values: Tensor = torch.ops.aten.gelu_backward(gradient, values)
    return of_values


_gelu.register_fake(torch.empty_like)
_gelu_backward.register_fake(lambda gradient, values: torch.empty_like(values))
_gelu.register_autograd(
    lambda ctx, gradient: _gelu_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


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
