"""Student and teacher: one network each, the teacher a copy that only an average of the student changes.

Shapes: B images, G global views, L local views, V = G + L, N images, C channels, H x W and h x w pixels, D features,
K prototypes. Rows are view-major: all images of view 0, then of view 1, ...
"""

import copy

import torch
from torch import Tensor, nn

from dino.backbone.base import Backbone
from dino.model.head import DINOHead
from dino.model.projection import Projection
from dino.model.wiring import check_wiring, stochastic_modules


class MultiCropModel(nn.Module):
    """Backbone and head over views of several resolutions (original: utils.py, MultiCropWrapper).

    Features without the head, for evaluation, are `model.backbone(images)`.

    Raises:
        ValueError: if the head does not take the backbone's features.
    """

    def __init__(self, backbone: Backbone, head: DINOHead) -> None:
        super().__init__()
        if backbone.embed_dim != head.in_dim:
            raise ValueError(f"the backbone gives {backbone.embed_dim} features, but head.in_dim={head.in_dim}")
        self.backbone = backbone
        self.head = head

    def forward(self, global_views: Tensor, local_views: Tensor | None) -> tuple[Projection, Tensor]:
        """`[G, B, C, H, W]`, `[L, B, C, h, w]` or None -> what logits `[V * B, K]` are made of, features `[V * B, D]`.

        The backbone takes the views of one resolution as one batch, which is what its batch norms see, as in the
        original; the head takes all rows at once.
        """
        features = self.backbone(*_by_resolution(global_views, local_views))
        return self.head(features), features


def _by_resolution(global_views: Tensor, local_views: Tensor | None) -> list[Tensor]:
    """The views as batches `[N, C, H, W]`, one per resolution, in the order of the views."""
    groups = [global_views.flatten(0, 1)]
    if local_views is not None:
        groups.append(local_views.flatten(0, 1))
        if groups[0].shape[1:] == groups[1].shape[1:]:
            return [torch.cat(groups)]
    return groups


class StudentTeacher(nn.Module):
    """The student as given, and the teacher: its copy without drop path, which never gets gradients.

    The teacher stays in training mode with the student: its batch norms use the statistics of the batch, as in the
    original (main_dino.py, where neither network is ever switched to evaluation).
    """

    def __init__(self, student: MultiCropModel) -> None:
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student)
        for _, module, attribute in stochastic_modules(self.teacher):
            setattr(module, attribute, 0.0)
        self.teacher.requires_grad_(False)

    @torch.no_grad()
    def teacher_forward(self, global_views: Tensor) -> Projection:
        """`[G, B, C, H, W]` -> what logits `[G * B, K]` are made of, without gradient."""
        projection: Projection = self.teacher(global_views, None)[0]
        return projection

    def student_forward(self, global_views: Tensor, local_views: Tensor | None) -> tuple[Projection, Tensor]:
        """As `MultiCropModel.forward`, of the student."""
        projection, features = self.student(global_views, local_views)
        return projection, features

    def check_wiring(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Checks the invariants of the start: nothing shared, teacher equal to the student, without gradients, without
        drop path, and outside the optimizer.

        Raises:
            WiringError: its subclass for the first invariant that does not hold, naming a tensor.
        """
        check_wiring(self.student, self.teacher, optimizer)
