"""Labels of a video's first frame carried through the others by the likeness of patches, without any training (paper,
section 4.2.2; original: eval_video_segmentation.py).

Shapes: h x w patches, D features, M labels (background first), S frames to copy from, H x W pixels.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

QUERY_CHUNK = 1024  # patches that are compared at a time


@dataclass(frozen=True, kw_only=True)
class Propagation:
    """How labels travel.

    Attributes:
        num_last_frames: frames to copy from beside the first one.
        radius: only patches at most so many rows and columns away are copied from; 0: all.
        top_k: of the most similar patches, over all frames, the label is a weighted mean.
        temperature: weight of a patch = exp(cosine similarity / temperature).
    """

    num_last_frames: int = 7
    radius: int = 12
    top_k: int = 5
    temperature: float = 0.1

    def __call__(self, frames: Iterable[Tensor], first_labels: Tensor) -> Iterator[Tensor]:
        """Soft labels [M, h, w] of every frame after the first.

        Args:
            frames: patch features [h, w, D] of each frame, the first included.
            first_labels: [M, h, w] of the first frame, one label a patch.
        """
        frames = iter(frames)
        first = (F.normalize(next(frames), dim=-1), first_labels)
        last: deque[tuple[Tensor, Tensor]] = deque(maxlen=max(self.num_last_frames, 1))
        near = neighbourhood(first_labels.shape[1], first_labels.shape[2], self.radius).to(
            first_labels.device
        )  # [h * w, h * w]
        for frame in frames:
            features = F.normalize(frame, dim=-1)
            sources = [first, *last] if self.num_last_frames else [first]
            labels = self._copied(features, sources, near)
            last.append((features, labels))
            yield labels

    def _copied(self, features: Tensor, sources: list[tuple[Tensor, Tensor]], near: Tensor) -> Tensor:
        """[h, w, D] and S frames with their labels -> [M, h, w]."""
        bank = torch.cat([frame.flatten(0, 1) for frame, _ in sources])  # [S * h * w, D]
        known = torch.cat([labels.flatten(1) for _, labels in sources], dim=1)  # [M, S * h * w]
        parts = []
        for queries, allowed in zip(
            torch.split(features.flatten(0, 1), QUERY_CHUNK), torch.split(near, QUERY_CHUNK), strict=True
        ):
            weights = (queries @ bank.T / self.temperature).exp() * allowed.repeat(1, len(sources))
            # As the original: all patches at least as similar as the k-th, so equal ones all count.
            least = weights.topk(min(self.top_k, weights.shape[1]), dim=1).values[:, -1:]
            weights = torch.where(weights < least, 0.0, weights)
            parts.append(known @ (weights / weights.sum(dim=1, keepdim=True)).T)
        return torch.cat(parts, dim=1).view(-1, *features.shape[:2])


def neighbourhood(height: int, width: int, radius: int) -> Tensor:
    """[h * w, h * w] of 1 where two patches are at most `radius` rows and columns apart, else 0; radius 0: all 1."""
    if radius == 0:
        return torch.ones(height * width, height * width)
    rows, columns = (torch.arange(side) for side in (height, width))
    near_rows = (rows[:, None] - rows[None]).abs() <= radius
    near_columns = (columns[:, None] - columns[None]).abs() <= radius
    near = near_rows[:, None, :, None] & near_columns[None, :, None, :]
    return near.reshape(height * width, height * width).float()


def to_pixels(labels: Tensor, size: tuple[int, int], patch_size: int) -> Tensor:
    """Soft labels [M, h, w] -> the most likely label of every pixel, uint8 [H, W].

    As the original: enlarged by the patch (bilinear), each label that occurs stretched to 0..1, the largest taken, then
    brought to `size` (height, width) without mixing.
    """
    enlarged = F.interpolate(labels[None], scale_factor=patch_size, mode="bilinear", align_corners=False)[0]
    low, high = enlarged.amin(dim=(1, 2), keepdim=True), enlarged.amax(dim=(1, 2), keepdim=True)
    stretched = torch.where(high > 0, (enlarged - low) / (high - low).clamp(min=torch.finfo(high.dtype).tiny), enlarged)
    chosen = stretched.argmax(dim=0).float()
    return F.interpolate(chosen[None, None], size, mode="nearest-exact")[0, 0].byte()
