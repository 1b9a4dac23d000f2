"""KoLeo: spreads features evenly over the sphere.

Shapes: B images in the batch, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.loss.precision import at_least_float32, no_autocast

EPSILON = 1e-8  # keeps the logarithm of the distance between equal features finite (DINOv2)


def koleo_loss(features: Tensor) -> Tensor:
    """Minus the mean logarithm of each feature's distance to its nearest neighbour; features [B, D], result 0-d.

    The Kozachenko-Leonenko estimator of the entropy of L2-normalised features (Sablayrolles et al. 2019; DINOv2,
    section 4), within one view's batch, so that two views of one image are never pushed apart. Not a cross-entropy: it
    may be negative. A batch of one has no neighbour and gives 0.
    """
    if len(features) < 2:
        return at_least_float32(features).new_zeros(())
    with no_autocast(features):
        unit = F.normalize(at_least_float32(features), dim=-1)
        with torch.no_grad():
            similarity = unit @ unit.T
            nearest = similarity.fill_diagonal_(-2.0).argmax(dim=1)  # below any cosine: never its own neighbour
        # Clamped before the root, whose gradient at 0 is infinite.
        squared = (unit - unit[nearest]).square().sum(dim=-1).clamp_min(EPSILON**2)
        return -squared.sqrt().log().mean()
