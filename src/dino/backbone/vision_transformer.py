"""The vision transformer of DINO in plain torch (original: vision_transformer.py).

timm has the same network, but importing it takes longer (8 s) than a short run; `backbone=timm` is there for the rest.
Parameter names and their order are the original's, so that its weights load as they are.

Shapes: N images, C channels, H x W pixels, T = 1 + H/patch * W/patch tokens (class token first), D features.
"""

import torch
from torch import Tensor, nn

from dino.backbone.attention import packed, unpacked
from dino.backbone.base import Backbone, check_at_least
from dino.backbone.layouts import State
from dino.backbone.positions import resize_positions
from dino.backbone.transformer import Block
from dino.backbone.weights import load_initial_weights
from dino.linear import linear, type_of_products

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
        tokens = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        return tokens + resize_positions(self.pos_embed, height // self.patch_size, width // self.patch_size)

    def forward(self, *batches: Tensor) -> Tensor:
        """Batches `[N_i, C, H_i, W_i]` -> their class tokens, one batch below the other, `[sum N_i, D]`.

        The tokens of all sizes are one matrix for everything that looks at one token at a time. Nothing but the class
        token is made of the last block, since nothing else is looked at.
        """
        tokens, layout = packed([self.prepare_tokens(images) for images in batches])
        for block in self._blocks[:-1]:
            tokens = block.run(tokens, layout, recompute=self.recompute)
        last = self._blocks[-1].run(tokens, layout, class_tokens_only=True, recompute=self.recompute)
        features: Tensor = self.norm(last)
        return features

    @property
    def has_tokens(self) -> bool:
        return True

    def last_attention(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, heads, T, T]`: the last block's attention after softmax, rows sum to 1."""
        tokens, layout = packed([self.prepare_tokens(images)])
        for block in self._blocks[:-1]:
            tokens = block.run(tokens, layout)
        last = self._blocks[-1]
        (weights,) = last.attn.weights(last.norm1(tokens), layout)
        return weights

    def intermediate_layers(self, images: Tensor, n: int) -> list[Tensor]:
        """`[N, C, H, W]` -> outputs of the last `n` blocks after the final LayerNorm, `[N, T, D]` each, oldest first.

        Raises:
            ValueError: if there are not `n` blocks.
        """
        if not 1 <= n <= self.depth:
            raise ValueError(f"n={n} last blocks: the backbone has {self.depth}")
        tokens, layout = packed([self.prepare_tokens(images)])
        outputs = []
        for index, block in enumerate(self._blocks):
            tokens = block.run(tokens, layout)
            if index >= self.depth - n:
                outputs += unpacked(self.norm(tokens), layout)
        return outputs

    @property
    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def compile_parts(self) -> None:
        """Block by block: one of them is compiled in seconds, and its code serves all."""
        for block in self._blocks:
            block.compile()


class PatchEmbedding(nn.Module):
    """One linear map per patch, as a convolution whose stride is its size."""

    def __init__(self, patch_size: int, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = PatchConvolution(channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, T - 1, D]`, row by row."""
        grid: Tensor = self.proj(images)
        return grid.flatten(2).transpose(1, 2)


class PatchConvolution(nn.Conv2d):
    """A convolution whose stride is its size, made as the linear layer of the patches that it is."""

    def forward(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, D, H / patch, W / patch]`, channels last."""
        side = self.kernel_size[0]
        images = images.to(type_of_products(images))
        grid = torch.unflatten(torch.unflatten(images, 3, (-1, side)), 2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
        assert self.bias is not None
        tokens = linear(grid.flatten(3).flatten(0, 2), self.weight.flatten(1), self.bias)
        return torch.unflatten(tokens, 0, (-1, grid.shape[1], grid.shape[2])).permute(0, 3, 1, 2)
