"""Cross-entropy over pairs of views, in two loops.

Shapes: B images, G global views, V views, K prototypes, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DINOLoss(nn.Module):
    """The loss of a batch; each call moves the center afterwards."""

    def __init__(self, out_dim: int, num_views: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.num_views, self.student_temp, self.center_momentum = num_views, student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """[V * B, K] and [2 * B, K] -> 0-d."""
        student = (student_logits / self.student_temp).chunk(self.num_views)
        teacher = F.softmax((teacher_logits - self.center) / teacher_temp, dim=-1).detach().chunk(2)
        total, num_pairs = 0, 0
        for i, targets in enumerate(teacher):
            for j, logits in enumerate(student):
                if i == j:
                    continue
                total = total + torch.sum(-targets * F.log_softmax(logits, dim=-1), dim=-1).mean()
                num_pairs += 1
        self.update_center(teacher_logits)
        return total / num_pairs

    @torch.no_grad()
    def update_center(self, teacher_logits: Tensor) -> None:
        mean = teacher_logits.sum(dim=0, keepdim=True) / len(teacher_logits)
        self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)


def koleo_loss(features: Tensor) -> Tensor:
    """Minus the mean logarithm of the distance to the nearest neighbour: one view's features [B, D] -> 0-d."""
    unit = F.normalize(features, dim=-1)
    with torch.no_grad():
        similarity = unit @ unit.T
        similarity.fill_diagonal_(-2)
        nearest = similarity.argmax(dim=1)
    return -(unit - unit[nearest]).norm(dim=-1).clamp_min(1e-8).log().mean()
