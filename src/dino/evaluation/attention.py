"""What a vision transformer looks at: attention of the class token, and patches as colours (original:
visualize_attention.py).

Shapes: N images, C channels, H x W pixels, h x w patches, D features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dino.backbone import Backbone


def class_attention(backbone: Backbone, images: Tensor) -> Tensor:
    """`[N, C, H, W]` -> `[N, heads, h, w]`: the last block's attention of the class token to each patch, after softmax.

    With what the class token gives to itself a head sums to 1.

    Raises:
        ValueError: for a backbone without attention, and for sizes that its patches do not divide.
    """
    weights = backbone.last_attention(images)[:, :, 0, 1:]  # of the row of the class token, without itself
    height, width = (side // backbone.patch_size for side in images.shape[-2:])
    return torch.unflatten(weights, -1, (height, width))


def mass_mask(attention: Tensor, threshold: float) -> Tensor:
    """`[..., h, w]` -> bool: of each map the fewest patches that together hold at least `threshold` of its mass.

    As the original: patches in rising order, those are kept at which the cumulated share exceeds 1 - threshold.

    Raises:
        ValueError: for a threshold outside of 0 to 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold {threshold:g}: use a share of the attention above 0 and at most 1, such as 0.6")
    values, order = attention.flatten(-2).sort(dim=-1)
    sums = values.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    kept = (values / sums).cumsum(dim=-1) > 1 - threshold
    return torch.zeros_like(kept).scatter(-1, order, kept).view(attention.shape)


def patch_features(backbone: Backbone, images: Tensor) -> Tensor:
    """`[N, C, H, W]` -> `[N, h, w, D]`: the patch tokens of the last block, after the final LayerNorm.

    Raises:
        ValueError: for a backbone without patch tokens, and for sizes that its patches do not divide.
    """
    tokens = backbone.intermediate_layers(images, 1)[0][:, 1:]
    height, width = (side // backbone.patch_size for side in images.shape[-2:])
    return torch.unflatten(tokens, 1, (height, width))


@dataclass(frozen=True)
class PatchColours:
    """Three directions in which patches differ most, as red, green and blue; fitted once, so that images compare."""

    mean: Tensor  # [D]
    directions: Tensor  # [D, 3]
    low: Tensor  # [3]
    high: Tensor  # [3]

    @classmethod
    def fit(cls, patches: Tensor) -> "PatchColours":
        """To patch features [..., D]; the signs are such that the same features give the same colours everywhere."""
        rows = patches.flatten(0, -2).float()
        mean = rows.mean(dim=0)
        _, _, directions = torch.linalg.svd(rows - mean, full_matrices=False)
        directions = directions[:3].T
        if directions.shape[1] < 3:
            directions = torch.nn.functional.pad(directions, (0, 3 - directions.shape[1]))
        largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
        directions = directions * torch.where(largest < 0, -1.0, 1.0)
        projected = (rows - mean) @ directions
        low, high = (projected.quantile(share, dim=0) for share in (0.02, 0.98))
        return cls(mean, directions, low, high)

    def __call__(self, patches: Tensor) -> Tensor:
        """[..., D] -> [..., 3] from 0 to 1."""
        projected = (patches.float() - self.mean) @ self.directions
        return ((projected - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(0, 1)


def correspondences(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Patches of two images, [h, w, D] and [h', w', D], that are each other's nearest by cosine similarity.

    Returns:
        [n, 4] int64, row and column in the first and row and column in the second image, and similarities [n], the
        most similar first.
    """
    one, other = (normalize(features.flatten(0, 1).float(), dim=-1) for features in (first, second))
    similarity = one @ other.T
    best, back = similarity.argmax(dim=1), similarity.argmax(dim=0)
    mutual = (back[best] == torch.arange(len(one))).nonzero()[:, 0]
    values = similarity[mutual, best[mutual]]
    order = values.argsort(descending=True, stable=True)
    here, there = mutual[order], best[mutual][order]
    places = [here // first.shape[1], here % first.shape[1], there // second.shape[1], there % second.shape[1]]
    return torch.stack(places, dim=1), values[order]
