"""How well predicted masks fit: J, the overlap of regions, and F, the fit of contours.

Perazzi et al. 2016, "A benchmark dataset and evaluation methodology for video object segmentation", section 5.

Shapes: T frames, H x W pixels.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

TOLERANCE = 0.008  # of the diagonal: how far a contour may be from where it should be
GOOD = 0.5  # a frame is recalled above this


def region_overlap(predicted: Mask, truth: Mask) -> float:
    """J: intersection over union of two masks [H, W]; 1 where both are empty."""
    union = int((predicted | truth).sum())
    return int((predicted & truth).sum()) / union if union else 1.0


def contour_fit(predicted: Mask, truth: Mask) -> float:
    """F: harmonic mean of the shares of each contour that lie near the other one, for masks [H, W].

    Where one mask is empty, F is 0; where both are, 1.
    """
    import cv2  # late: 0.1 s

    radius = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    disk = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius
    contours = [contour(mask).astype(np.uint8) for mask in (predicted, truth)]
    sizes = [int(each.sum()) for each in contours]
    if min(sizes) == 0:
        return 1.0 if max(sizes) == 0 else 0.0
    widened = [np.asarray(cv2.dilate(each, disk.astype(np.uint8)), np.uint8) for each in contours]
    precision = int((contours[0] & widened[1]).sum()) / sizes[0]
    recall = int((contours[1] & widened[0]).sum()) / sizes[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: Mask) -> Mask:
    """[H, W]: the pixels that differ from the one on their right, below, or both."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    edges: Mask = (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])
    return edges


def sequence_scores(predicted: NDArray[np.uint8], truth: NDArray[np.uint8]) -> list[dict[str, Any]]:
    """For every object of a video, labels [T, H, W] with 0 for the background: `object`, mean `j` and `f` over the
    frames, and `j_recall`, `f_recall`, the shares of frames above 0.5.

    As the DAVIS 2017 benchmark: the objects are those of the first true frame, and the first and the last frame do not
    count (the first is given, the last often has no object).
    """
    scores = []
    for label in sorted(set(np.unique(truth[0]).tolist()) - {0, 255}):
        pairs = [(p == label, t == label) for p, t in zip(predicted[1:-1], truth[1:-1], strict=True)]
        j, f = (np.array([measure(*pair) for pair in pairs]) for measure in (region_overlap, contour_fit))
        means = {"j": float(j.mean()), "f": float(f.mean())}
        recalls = {"j_recall": float((j > GOOD).mean()), "f_recall": float((f > GOOD).mean())}
        scores.append({"object": label} | means | recalls)
    return scores
