"""The DINO loss once more, step by step and slowly: what the fast one must equal, and what one prints to look inside.

Every intermediate has a name; nothing is shared with `dino_loss.py`. Centering is the moving average, every pair counts
the same (main_dino.py, DINOLoss).

Shapes: B images in the batch, G global views, L local views, V = G + L, K prototypes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossSteps:
    """Everything that happens between logits and loss, in order."""

    student_views: list[Tensor]  # V x [B, K], the student's logits by view
    teacher_views: list[Tensor]  # G x [B, K], the teacher's logits by view
    centered_teacher: list[Tensor]  # G x [B, K], minus the old center
    teacher_probabilities: list[Tensor]  # G x [B, K], sharpened by the teacher's temperature
    student_log_probabilities: list[Tensor]  # V x [B, K]
    image_losses: dict[tuple[int, int], Tensor]  # (teacher view, student view) -> [B]
    pair_losses: dict[tuple[int, int], Tensor]  # (teacher view, student view) -> 0-d
    global_term: Tensor  # mean over the pairs with a global view of the student
    local_term: Tensor | None  # mean over the pairs with a local one; None without local views
    total: Tensor  # mean over all pairs
    teacher_mean: Tensor  # [1, K], of the raw teacher logits
    center_before: Tensor  # [1, K]
    center_after: Tensor  # [1, K]


def step_by_step(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    num_global_views: int,
    student_temp: float,
    teacher_temp: float,
    center: Tensor,
    center_momentum: float,
) -> LossSteps:
    """The loss of student logits [V*B, K] and teacher logits [G*B, K] under a center [1, K]. Inputs are left alone."""
    batch = len(teacher_logits) // num_global_views
    student_views = list(torch.split(student_logits, batch))
    teacher_views = list(torch.split(teacher_logits.detach(), batch))

    centered_teacher = [logits - center for logits in teacher_views]
    teacher_probabilities = [torch.softmax(logits / teacher_temp, dim=-1) for logits in centered_teacher]
    student_log_probabilities = [torch.log_softmax(logits / student_temp, dim=-1) for logits in student_views]

    image_losses: dict[tuple[int, int], Tensor] = {}
    for i, probabilities in enumerate(teacher_probabilities):
        for j, log_probabilities in enumerate(student_log_probabilities):
            if i == j:
                continue  # the same view of the same image
            image_losses[i, j] = -(probabilities * log_probabilities).sum(dim=-1)
    pair_losses = {pair: losses.mean() for pair, losses in image_losses.items()}
    global_losses = [loss for (_, j), loss in pair_losses.items() if j < num_global_views]
    local_losses = [loss for (_, j), loss in pair_losses.items() if j >= num_global_views]

    teacher_mean = teacher_logits.detach().mean(dim=0, keepdim=True)
    return LossSteps(
        student_views=student_views,
        teacher_views=teacher_views,
        centered_teacher=centered_teacher,
        teacher_probabilities=teacher_probabilities,
        student_log_probabilities=student_log_probabilities,
        image_losses=image_losses,
        pair_losses=pair_losses,
        global_term=torch.stack(global_losses).mean(),
        local_term=torch.stack(local_losses).mean() if local_losses else None,
        total=torch.stack(list(pair_losses.values())).mean(),
        teacher_mean=teacher_mean,
        center_before=center,
        center_after=center_momentum * center + (1 - center_momentum) * teacher_mean,
    )
