"""The vision transformer of DINO in plain torch (original: vision_transformer.py).

timm has the same network, but importing it takes longer (8 s) than a short run; `backbone=timm` is there for the rest.
Parameter names and their order are the original's, so that its weights load as they are.

Shapes: N images, C channels, H x W pixels, T = 1 + H/patch * W/patch tokens (class token first), D features.
"""

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

    def forward(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, D]`, the class token."""
        tokens = self.prepare_tokens(images)
        for block in self.blocks:
            tokens = block(tokens)
        features: Tensor = self.norm(tokens[:, 0])
        return features

    def last_attention(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, heads, T, T]`: the last block's attention after softmax, rows sum to 1."""
        tokens = self.prepare_tokens(images)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        query, key, _ = last.attn.split_heads(last.norm1(tokens))
        return attention_weights(query, key)

    def intermediate_layers(self, images: Tensor, n: int) -> list[Tensor]:
        """`[N, C, H, W]` -> outputs of the last `n` blocks after the final LayerNorm, `[N, T, D]` each, oldest first.

        Raises:
            ValueError: if there are not `n` blocks.
        """
        if not 1 <= n <= self.depth:
            raise ValueError(f"n={n} last blocks: the backbone has {self.depth}")
        tokens = self.prepare_tokens(images)
        outputs = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index >= self.depth - n:
                outputs.append(self.norm(tokens))
        return outputs


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

    def forward(self, tokens: Tensor) -> Tensor:
        """`[N, T, D]` -> `[N, T, D]`."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        output: Tensor = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return output


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def split_heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[N, T, D]` -> query, key, value, `[N, heads, T, D / heads]` each."""
        n, t, d = tokens.shape
        qkv: Tensor = self.qkv(tokens)
        qkv = qkv.reshape(n, t, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return query, key, value

    def forward(self, tokens: Tensor) -> Tensor:
        """`[N, T, D]` -> `[N, T, D]`."""
        query, key, value = self.split_heads(tokens)
        if query.device.type == "cuda":
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            # On a CPU the fused kernel's backward is slower: 750 ms of a 2.0 s bf16 step, against 165 ms like this.
            mixed = attention_weights(query, key) @ value
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


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
        """`[N, T, D]` -> `[N, T, D]`."""
        projected: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return projected


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's residual branch is zero with probability `drop_prob`, else scaled up."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, branch: Tensor) -> Tensor:
        """`[N, ...]` -> `[N, ...]`, one draw per sample."""
        if self.drop_prob == 0 or not self.training:
            return branch
        keep = 1 - self.drop_prob
        # bernoulli_, since comparing uniform numbers in bf16, as floor(keep + rand) does, would round the rate.
        mask: Tensor = branch.new_empty((len(branch),) + (1,) * (branch.ndim - 1)).bernoulli_(keep)
        return branch * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"
