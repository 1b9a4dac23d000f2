"""KoLeo: spreads features evenly over the sphere.

Shapes: G global views, B images in the batch, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.loss.precision import at_least_float32, no_autocast
from dino.ranks import rank, rows_of_all_ranks, world_size

EPSILON = 1e-8  # keeps the logarithm of the distance between equal features finite (DINOv2)


def koleo_loss(features: Tensor) -> Tensor:
    """Minus the mean logarithm of each feature's distance to its nearest neighbour; features [G, B, D], result 0-d.

    The Kozachenko-Leonenko estimator of the entropy of L2-normalised features (Sablayrolles et al. 2019; DINOv2,
    section 4), within one view's batch of all ranks, so that two views of one image are never pushed apart. Not a
    cross-entropy: it may be negative. A batch of one has no neighbour and gives 0.
    """
    num_views, batch, _ = features.shape
    if batch * world_size() < 2:
        return at_least_float32(features).new_zeros(())
    with no_autocast(features):
        unit = F.normalize(at_least_float32(features), dim=-1)
        everyone = rows_of_all_ranks(unit.transpose(0, 1)).transpose(0, 1)  # [G, B of all ranks, D]
        with torch.no_grad():
            similarity = torch.bmm(unit, everyone.transpose(1, 2))  # [G, B, B of all ranks]
            similarity.diagonal(rank() * batch, 1, 2).fill_(-2.0)  # below any cosine: never its own neighbour
            nearest = similarity.argmax(dim=2)
        view = torch.arange(num_views, device=unit.device)[:, None]
        squared = (unit - everyone[view, nearest]).square().sum(dim=-1).clamp_min(EPSILON**2)
        return -0.5 * squared.log().mean()  # no root, whose gradient at 0 would be infinite
