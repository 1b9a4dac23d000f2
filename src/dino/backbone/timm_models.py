"""Any network of timm as a backbone (`backbone=timm backbone.model_name=...`).

Shapes: N images, C channels, H x W pixels, D features.
"""

import difflib
import re
from typing import Any

import torch
from torch import Tensor, nn

from dino.backbone.base import check_at_least
from dino.backbone.one_size import OneSizeBackbone
from dino.backbone.weights import fetch, load_initial_weights


class TimmBackbone(OneSizeBackbone):
    """A timm network without its classifier; its feature is timm's pooled one.

    Args:
        model_name: as timm lists it, e.g. `convnext_tiny` or `vit_small_patch16_224.dino`.
        patch_size: view sizes are fitted to multiples of this [pixels]; for a ViT set its patch.
        image_size: side of the global views [pixels]; a ViT's position table is made for it.
        channels: C.
        drop_path_rate: stochastic depth, for networks that have it.
        weights: file to start from (`load_weights`), teacher's weights where it has both.
        pretrained: start from timm's weights for `model_name`, downloaded.

    Raises:
        ValueError: for an unknown name, and for what the network does not have.
    """

    def __init__(
        self,
        *,
        model_name: str,
        patch_size: int = 1,
        image_size: int = 224,
        channels: int = 3,
        drop_path_rate: float = 0.0,
        weights: str | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        check_at_least("backbone", 1, patch_size=patch_size, image_size=image_size, channels=channels)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"backbone.drop_path_rate={drop_path_rate}: must be at least 0 and below 1")
        _check_name(model_name, pretrained)
        self.model_name, self.image_size = model_name, image_size
        if pretrained and weights is not None:
            raise ValueError(f"backbone.weights={weights} and backbone.pretrained=true exclude each other; choose one")
        self.network, taken = _create(model_name, pretrained, channels, image_size, drop_path_rate)
        self.takes_image_size = "img_size" in taken  # whether timm makes it for one size of images
        # Some networks end in one more layer after the pooling, whose width is this.
        width: Any = getattr(self.network, "head_hidden_size", None) or self.network.num_features
        self.embed_dim = int(width)
        patch = _patch_size(self.network)
        if patch_size > 1 and patch_size % patch:
            raise ValueError(f"backbone.patch_size={patch_size}: {model_name} has patches of {patch}; set that")
        if self.has_tokens and patch_size not in (1, patch):
            raise ValueError(f"backbone.patch_size={patch_size}: {model_name} has patches of {patch}; set that")
        self.patch_size = max(patch, patch_size)
        if self.has_tokens:
            blocks: Any = self.network.blocks
            self.depth, self.num_heads = len(blocks), int(blocks[-1].attn.num_heads)
        self.check_image_size(image_size)
        load_initial_weights(self, weights, None)
        self.to(memory_format=torch.channels_last)  # the faster one of convolutions, on CPUs and tensor cores

    @property
    def has_tokens(self) -> bool:
        from timm.layers.patch_embed import PatchEmbed
        from timm.models.vision_transformer import Block, VisionTransformer

        network: Any = self.network
        plain = isinstance(network, VisionTransformer) and isinstance(network.patch_embed, PatchEmbed)
        if not plain or network.cls_token is None:
            return False
        # Blocks of other kinds (parallel, convolutional) have no attention that could be asked for.
        return all(isinstance(block, Block) for block in network.blocks.children())

    def intermediate_layers(self, images: Tensor, n: int) -> list[Tensor]:
        """As in the base class; registers are left out."""
        if not self.has_tokens:
            return super().intermediate_layers(images, n)
        if not 1 <= n <= self.depth:
            raise ValueError(f"n={n} last blocks: the backbone has {self.depth}")
        network: Any = self.network
        options = {"norm": True, "output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True}
        layers = network.forward_intermediates(images, indices=n, **options)
        return [torch.cat((prefix[:, :1], patches), dim=1) for patches, prefix in layers]

    def last_attention(self, images: Tensor) -> Tensor:
        """As in the base class; what goes to registers is left out, so with them rows sum to less than 1."""
        if not self.has_tokens:
            return super().last_attention(images)
        network: Any = self.network
        self.check_size(*images.shape[-2:])
        tokens = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(images))))
        for block in network.blocks[:-1]:
            tokens = block(tokens)
        attention, last = network.blocks[-1].attn, network.blocks[-1].norm1(tokens)
        shape = (len(tokens), tokens.shape[1], 3, attention.num_heads, -1)
        query, key, _ = attention.qkv(last).view(shape).permute(2, 0, 3, 1, 4)
        scores = (attention.q_norm(query) * attention.scale) @ attention.k_norm(key).transpose(-2, -1)
        kept = [0, *range(network.num_prefix_tokens, tokens.shape[1])]
        weights: Tensor = scores.softmax(dim=-1)[:, :, kept][..., kept]
        return weights

    def published(self) -> nn.Module:
        return self.network

    def features_of(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, D]`.

        Raises:
            ValueError: for H or W that are not multiples of the patch, or not those that the network is made for.
        """
        height, width = images.shape[-2:]
        self.check_size(height, width)
        try:
            features: Tensor = self.network(images.contiguous(memory_format=torch.channels_last))
        except (AssertionError, RuntimeError) as error:
            # timm's networks of a fixed size say so in one of these ways.
            fixed = isinstance(error, AssertionError) or "size of tensor" in str(error)
            if not fixed or (height, width) == (self.image_size, self.image_size):
                raise
            raise ValueError(
                f"backbone.model_name={self.model_name} takes only images of {self.image_size} x {self.image_size} "
                f"pixels, not {height} x {width}: use augmentation.num_local_views=0 or another network"
            ) from error
        return features


def _check_name(model_name: str, pretrained: bool) -> None:
    import timm  # late: 8 s

    name, _, tag = model_name.partition(".")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"close names: {', '.join(close)}" if close else "timm.list_models() lists them all"
        raise ValueError(f"backbone.model_name={model_name}: timm has no such network; {hint}")
    tags = [published.partition(".")[2] for published in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        known = f"it has {', '.join(tags)}" if tags else "it has none"
        raise ValueError(f"backbone.model_name={model_name}: {name} has no weights called {tag}; {known}")
    if pretrained and not timm.models.is_model_pretrained(model_name):
        raise ValueError(f"backbone.pretrained=true: timm has no weights for {model_name}")


def _create(
    model_name: str, pretrained: bool, channels: int, image_size: int, drop_path_rate: float
) -> tuple[nn.Module, list[str]]:
    """The network with those of the options that it takes, and which: only its constructor knows."""
    from timm import create_model

    options: dict[str, Any] = {
        "drop_path_rate": drop_path_rate,
        "img_size": image_size,
        "dynamic_img_size": True,  # plain ViTs: several sizes
        "strict_img_size": False,  # Swin and relatives: several sizes
    }
    shape: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    while True:
        try:
            network: nn.Module = create_model(model_name, **shape, **options)
            break
        except TypeError as error:
            refused = options.keys() & re.findall(r"'(\w+)'", str(error).partition("unexpected keyword argument")[2])
            if not refused:
                raise
            if "drop_path_rate" in refused and drop_path_rate > 0:
                text = f"backbone.drop_path_rate={drop_path_rate}: {model_name} has no drop path; use 0"
                raise ValueError(text) from error
            options = {name: value for name, value in options.items() if name not in refused}
    if pretrained:
        network = fetch(lambda: create_model(model_name, pretrained=True, **shape, **options))
    return network, list(options)


def _patch_size(network: nn.Module) -> int:
    """A ViT's patch, 1 for others."""
    size = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    return int(size[0] if isinstance(size, tuple | list) else size)
