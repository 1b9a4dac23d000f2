"""The vision transformer of DINO in plain torch (original: vision_transformer.py).

timm has the same network, but importing it takes longer (8 s) than a short run; `backbone=timm` is there for the rest.
Parameter names and their order are the original's, so that its weights load as they are.

Shapes: N images, C channels, H x W pixels, T = 1 + H/patch * W/patch tokens (class token first), D features,
R = sum of N * T over the batches of one pass: rows of the one matrix in which the tokens of all of them lie.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino.backbone.base import Backbone, check_at_least
from dino.backbone.layouts import State
from dino.backbone.positions import resize_positions
from dino.backbone.weights import load_initial_weights

# Published by the authors of DINO and mirrored by timm: (embed_dim, depth, num_heads, patch_size) -> name there.
PUBLISHED = {
    (384, 12, 6, 16): "vit_small_patch16_224.dino",
    (384, 12, 6, 8): "vit_small_patch8_224.dino",
    (768, 12, 12, 16): "vit_base_patch16_224.dino",
    (768, 12, 12, 8): "vit_base_patch8_224.dino",
}


class VisionTransformer(Backbone):
    """Pre-norm transformer on image patches; its feature is the class token after the final LayerNorm.

    Args:
        image_size: side of the square images that the position table is made for [pixels]; others are interpolated.
        patch_size: side of a patch [pixels].
        embed_dim: D, a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of a block's MLP / D.
        channels: C.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        weights: file to start from (`load_weights`), teacher's weights where it has both.
        pretrained: start from the weights that the authors published for this shape, downloaded by timm.

    Raises:
        ValueError: for a value out of its range, naming it.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        channels: int = 3,
        drop_path_rate: float = 0.0,
        weights: str | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        check_at_least("backbone", 1, patch_size=patch_size, embed_dim=embed_dim, depth=depth, channels=channels)
        check_at_least("backbone", 1, num_heads=num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"backbone.embed_dim={embed_dim}: must be a multiple of backbone.num_heads={num_heads}")
        if mlp_ratio * embed_dim < 1:
            raise ValueError(f"backbone.mlp_ratio={mlp_ratio}: must be positive")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"backbone.drop_path_rate={drop_path_rate}: must be at least 0 and below 1")
        self.embed_dim, self.patch_size, self.num_heads, self.depth = embed_dim, patch_size, num_heads, depth
        self.check_image_size(image_size)
        published = PUBLISHED.get((embed_dim, depth, num_heads, patch_size))
        if pretrained and published is None:
            known = ", ".join(PUBLISHED.values())
            raise ValueError(f"backbone.pretrained=true: there are no DINO weights of this shape, only {known}")

        num_patches = (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, embed_dim))
        self.patch_embed = PatchEmbedding(patch_size, channels, embed_dim)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.initialize()

        def published_weights() -> State:
            from timm import create_model  # late: 8 s

            assert published is not None
            return dict(create_model(published, pretrained=True, num_classes=0).state_dict())

        load_initial_weights(self, weights, published_weights if pretrained else None)

    def initialize(self) -> None:
        """Overwrites every parameter: normal (0.02) tokens, positions and matrices, zero biases; the patch
        convolution keeps torch's own initialisation, as in the original."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()

    def prepare_tokens(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, T, D]`: class token and patches, positions added.

        Raises:
            ValueError: for H or W that are not multiples of the patch, or another number of channels.
        """
        _, channels, height, width = images.shape
        self.check_size(height, width)
        expected = self.patch_embed.proj.in_channels
        if channels != expected:
            raise ValueError(f"images have {channels} channels, but backbone.channels={expected}")
        patches = self.patch_embed(images)
        tokens = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        return tokens + resize_positions(self.pos_embed, height // self.patch_size, width // self.patch_size)

    def forward(self, *batches: Tensor) -> Tensor:
        """Batches `[N_i, C, H_i, W_i]` -> their class tokens, one batch below the other, `[sum N_i, D]`.

        The tokens of all sizes are one matrix for everything that looks at one token at a time. Nothing but the class
        token is made of the last block, since nothing else is looked at.
        """
        tokens, layout = packed([self.prepare_tokens(images) for images in batches])
        for block in self.blocks[:-1]:
            tokens = block(tokens, layout)
        features: Tensor = self.norm(self.blocks[-1](tokens, layout, class_tokens_only=True))
        return features

    def last_attention(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, heads, T, T]`: the last block's attention after softmax, rows sum to 1."""
        tokens, layout = packed([self.prepare_tokens(images)])
        for block in self.blocks[:-1]:
            tokens = block(tokens, layout)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        ((query, key, _),) = last.attn.split_heads(last.norm1(tokens), layout)
        return attention_weights(query, key)

    def intermediate_layers(self, images: Tensor, n: int) -> list[Tensor]:
        """`[N, C, H, W]` -> outputs of the last `n` blocks after the final LayerNorm, `[N, T, D]` each, oldest first.

        Raises:
            ValueError: if there are not `n` blocks.
        """
        if not 1 <= n <= self.depth:
            raise ValueError(f"n={n} last blocks: the backbone has {self.depth}")
        tokens, layout = packed([self.prepare_tokens(images)])
        outputs = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, layout)
            if index >= self.depth - n:
                outputs.append(self.norm(tokens).unflatten(0, layout[0]))
        return outputs


class Sequences(NamedTuple):
    """Some of the rows of a token matrix: the tokens of one batch, image by image."""

    num_images: int  # N
    length: int  # T


Layout = Sequence[Sequences]


def packed(batches: Sequence[Tensor]) -> tuple[Tensor, Layout]:
    """Tokens `[N_i, T_i, D]` as one matrix `[R, D]`, and which rows are whose."""
    layout = [Sequences(len(tokens), tokens.shape[1]) for tokens in batches]
    rows = [tokens.flatten(0, 1) for tokens in batches]
    return rows[0] if len(rows) == 1 else torch.cat(rows), layout


def unpacked(rows: Tensor, layout: Layout) -> list[Tensor]:
    """`[R, X]` -> `[N_i, T_i, X]`."""
    parts = torch.split(rows, [images * length for images, length in layout])
    return [part.view(images, length, -1) for part, (images, length) in zip(parts, layout, strict=True)]


class PatchEmbedding(nn.Module):
    """One linear map per patch, as a convolution whose stride is its size."""

    def __init__(self, patch_size: int, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, T - 1, D]`, row by row."""
        grid: Tensor = self.proj(images)
        return grid.flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and in a residual branch with stochastic depth."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.drop_path = DropPath(drop_path_rate)  # one rate; each call draws anew
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = MLP(embed_dim, int(embed_dim * mlp_ratio))

    def forward(self, tokens: Tensor, layout: Layout, class_tokens_only: bool = False) -> Tensor:
        """`[R, D]` -> `[R, D]`, or only its class tokens, `[sum N, D]`."""
        branch = self.attn(self.norm1(tokens), layout, class_tokens_only)
        if class_tokens_only:
            tokens = torch.cat([part[:, 0] for part in unpacked(tokens, layout)])
            layout = [Sequences(part.num_images, 1) for part in layout]
        tokens = tokens + self.drop_path(branch, layout)
        output: Tensor = tokens + self.drop_path(self.mlp(self.norm2(tokens)), layout)
        return output


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
    return attention_weights(query, key) @ value  # in bf16 several times as fast on a CPU, forward and backward


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)): `[N, heads, T, d]` twice -> `[N, heads, T, T]`."""
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
    """Stochastic depth: in training a sample's residual branch is zero with probability `drop_prob`, else scaled up."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, branch: Tensor, layout: Layout) -> Tensor:
        """`[R, D]` -> `[R, D]`, one draw per image."""
        if self.drop_prob == 0 or not self.training:
            return branch
        keep = 1 - self.drop_prob
        # bernoulli_, since comparing uniform numbers in bf16, as floor(keep + rand) does, would round the rate.
        mask: Tensor = branch.new_empty(sum(part.num_images for part in layout), 1).bernoulli_(keep).div_(keep)
        masks = torch.split(mask, [part.num_images for part in layout])
        rows = [of_batch.expand(-1, part.length).flatten() for of_batch, part in zip(masks, layout, strict=True)]
        return branch * torch.cat(rows)[:, None]

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"
