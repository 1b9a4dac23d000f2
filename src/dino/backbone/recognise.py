"""Which backbone some weights belong to, read off the names and shapes of their tensors.

For files that say nothing of themselves: the original's, timm's, torchvision's and Hugging Face's.

Shapes: D features, C channels, P positions in a table, p x p pixels of a patch.
"""

import re
from typing import Any

from dino.backbone.layouts import State
from dino.backbone.positions import grid_side

HEAD_WIDTH = 64  # features of an attention head in every published ViT of the field, from Ti/16 to g/14
# Blocks in the four stages of torchvision's ResNets, and whether these are bottlenecks.
RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
BY_HAND = "name it with --backbone, as a config of conf/backbone (vit_s16) or a network of timm (timm/NAME)"


def recognise(state: State, num_heads: int | None = None) -> dict[str, Any]:
    """The settings of the backbone that a state fits: `_target_` and its arguments, none of which names weights.

    Args:
        state: tensors by our names, as `find_backbone` gives them.
        num_heads: attention heads per block, where the file has that beside it; otherwise heads are 64 wide, which the
            tensors do not tell.

    Raises:
        ValueError: if it is none of ours.
    """
    if "patch_embed.proj.weight" in state and "pos_embed" in state:
        return _vision_transformer(state, num_heads)
    if "layer4.0.conv1.weight" in state:
        return _resnet(state)
    if "features.0.0.weight" in state and len(state["features.0.0.weight"]) == 32:
        channels = state["features.0.0.weight"].shape[1]
        return {**_convolutional("efficientnet_b0"), "channels": channels}
    some = ", ".join(list(state)[:3])
    raise ValueError(f"which backbone it is cannot be told from its tensors ({some}, ...); {BY_HAND}")


def _vision_transformer(state: State, num_heads: int | None) -> dict[str, Any]:
    patches = state["patch_embed.proj.weight"]  # [D, C, p, p]
    embed_dim, channels, patch_size, _ = patches.shape
    depth = len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})
    side = grid_side(state["pos_embed"])
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if side is None or hidden is None or depth == 0:
        raise ValueError(f"it is a ViT, but none of DINO's (no class token, or another MLP); {BY_HAND}")
    if num_heads is None:
        num_heads, rest = divmod(embed_dim, HEAD_WIDTH)
        if rest:
            width = f"{embed_dim} features, whose number of heads its tensors do not tell"
            raise ValueError(f"it is a ViT of {width}; {BY_HAND}")
    return {
        "_target_": "dino.backbone.VisionTransformer",
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": len(hidden) / embed_dim,
        "channels": channels,
    }


def _resnet(state: State) -> dict[str, Any]:
    stages = tuple(
        len({match[1] for name in state if (match := re.match(rf"layer{stage}\.(\d+)\.", name))})
        for stage in range(1, 5)
    )
    name = RESNETS.get((stages, "layer1.0.conv3.weight" in state))
    first = state["conv1.weight"]
    if name is None:
        raise ValueError(f"it is a ResNet of {' + '.join(map(str, stages))} blocks, none of torchvision's; {BY_HAND}")
    stem = "small" if first.shape[-1] == 3 else "imagenet"
    return {**_convolutional(name), "stem": stem, "channels": first.shape[1]}


def _convolutional(architecture: str) -> dict[str, Any]:
    return {"_target_": "dino.backbone.ConvolutionalBackbone", "architecture": architecture}
