"""Vision transformer, projection head, and the two over views of several resolutions.

Shapes: N images, T tokens (class token first), D features, K prototypes.
"""

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VisionTransformer(nn.Module):
    """Pre-norm transformer; its feature is the class token after the last LayerNorm."""

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.patch_size, self.embed_dim = patch_size, embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, embed_dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(channels, embed_dim, patch_size, stride=patch_size)
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        self.apply(_initialize_linear)

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D]."""
        patches = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = tokens + self._positions(images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The position table [1, 1 + rows * columns, D], interpolated by the original's odd scale factor."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if rows == columns == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factors = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)], dim=1)


class Block(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = MLP(embed_dim)
        self.drop_path_rate = drop_path_rate

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T, D] -> the same."""
        tokens = tokens + self._drop_path(self.attn(self.norm1(tokens)))
        return tokens + self._drop_path(self.mlp(self.norm2(tokens)))

    def _drop_path(self, branch: Tensor) -> Tensor:
        if self.drop_path_rate == 0 or not self.training:
            return branch
        keep = 1 - self.drop_path_rate
        mask = (torch.rand(len(branch), 1, 1, dtype=branch.dtype, device=branch.device) + keep).floor()
        return branch / keep * mask


class Attention(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T, D] -> the same."""
        n, t, d = tokens.shape
        qkv = self.qkv(tokens).reshape(n, t, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        attention = (query @ key.transpose(-2, -1)) * (d // self.num_heads) ** -0.5
        attention = attention.softmax(dim=-1)
        return self.proj((attention @ value).transpose(1, 2).reshape(n, t, d))


class MLP(nn.Module):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Head(nn.Module):
    """Three linear layers, rows of length 1, then a weight-normed linear layer whose gain stays 1."""

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 2048, bottleneck_dim: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.apply(_initialize_linear)
        self.last_layer = prototypes_layer(bottleneck_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, K]."""
        return self.last_layer(F.normalize(self.mlp(features), dim=-1, p=2))


def prototypes_layer(bottleneck_dim: int, out_dim: int) -> nn.Linear:
    """Weight-normed, without bias; parameters `weight_g` (all 1, not trained) and `weight_v`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the parametrisation that replaces it has other names
        layer = nn.utils.weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
    layer.weight_g.data.fill_(1)
    layer.weight_g.requires_grad = False
    return layer


class MultiCrop(nn.Module):
    """Backbone once per resolution, then the head once."""

    def __init__(self, backbone: VisionTransformer, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """V views [B, C, H, W], those of one size side by side -> [V * B, K]; the features stay in `self.features`."""
        features, start = [], 0
        while start < len(views):
            end = start
            while end < len(views) and views[end].shape[-1] == views[start].shape[-1]:
                end += 1
            features.append(self.backbone(torch.cat(list(views[start:end]))))
            start = end
        self.features = torch.cat(features)
        return self.head(self.features)


def _initialize_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
