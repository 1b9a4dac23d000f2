"""The cross-entropies of all pairs from whole logits, without copies of them.

Some images are handled at a time, so that what is made of their logits stays in a cache. The backward pass makes it
again rather than keep it.

Shapes: B images, G global views, V views, c images of a chunk, K prototypes. Logits are view-major.
"""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dino.loss.precision import at_least_float32

CHUNK_ON_CPU: Final = 2**21  # logits of a chunk, at least those of one image: 8 MB in float32
CHUNK_ON_GPU: Final = 2**26


def fused_cross_entropies(
    student_logits: Tensor, targets: Tensor, num_global_views: int, student_temp: float, *, overwrite: bool = False
) -> Tensor:
    """Student logits [V*B, K] and targets [G*B, K] to the mean cross-entropy of every student view, [V].

    For a view it is the mean over images of the sum over all teacher views but the same one, so the global ones have
    G - 1 of them and the local ones G.

    Args:
        student_logits: with gradient; in any type, arithmetic is in float32 at least.
        targets: probabilities, no gradient.
        num_global_views: G.
        student_temp: temperature of the student.
        overwrite: the backward pass writes the gradient over the logits, which nobody may look at any more.
    """
    losses: Tensor = _CrossEntropies.apply(student_logits, targets, num_global_views, student_temp, overwrite)
    return losses


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, num_global_views: int, student_temp: float, overwrite: bool
    ) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.settings = num_global_views, student_temp, overwrite
        student, teacher = _by_view(logits, targets, num_global_views)
        sums = targets.new_zeros(num_global_views, len(student), dtype=_sum_type(targets))
        for part in _chunks(student):
            log_q = torch.log_softmax(at_least_float32(student[:, part]) / student_temp, dim=-1)  # [V, c, K]
            # All dot products of one image are a small matrix product.
            pairs = torch.bmm(teacher[:, part].transpose(0, 1), log_q.permute(1, 2, 0).to(targets))  # [c, G, V]
            sums -= pairs.sum(dim=0)
        sums.diagonal().zero_()  # the same view of the same image
        return (sums.sum(dim=0) / student.shape[1]).to(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets = ctx.saved_tensors
        num_global_views, student_temp, overwrite = ctx.settings
        student, teacher = _by_view(logits, targets, num_global_views)
        student_gradient = logits if overwrite else torch.empty_like(logits)
        by_view = student_gradient.view(student.shape)
        factors = (gradient / (student.shape[1] * student_temp)).to(targets)[:, None, None]  # [V, 1, 1]
        for part in _chunks(student):
            q = torch.softmax(at_least_float32(student[:, part]) / student_temp, dim=-1)  # [V, c, K]
            by_view[:, part] = logits_gradient_(q, teacher[:, part], factors)
        return student_gradient, None, None, None, None


def logits_gradient_(q: Tensor, p: Tensor, factors: Tensor) -> Tensor:
    """Student [V, c, k] and teacher [G, c, k] probabilities to factors x the gradient; made in the place of `q`.

    The gradient of a view's cross-entropy by its logits x temperature: (number of its teacher views) q - their sum.
    """
    num_global_views = len(p)
    total = p.sum(dim=0)
    local = q[num_global_views:]
    local.mul_(num_global_views).sub_(total)
    for j, view in enumerate(q[:num_global_views]):
        others = p[1 - j] if num_global_views == 2 else total - p[j]
        view.mul_(num_global_views - 1).sub_(others)
    return q.mul_(factors)


def _by_view(logits: Tensor, targets: Tensor, num_global_views: int) -> tuple[Tensor, Tensor]:
    """[V, B, K] and [G, B, K]."""
    teacher = targets.view(num_global_views, -1, targets.shape[-1])
    return logits.view(-1, *teacher.shape[1:]), teacher


def _chunks(student: Tensor) -> Iterator[slice]:
    num_views, batch, num_prototypes = student.shape
    limit = CHUNK_ON_CPU if student.device.type == "cpu" else CHUNK_ON_GPU
    size = max(1, limit // (num_views * num_prototypes))
    return (slice(start, start + size) for start in range(0, batch, size))


def _sum_type(tensor: Tensor) -> torch.dtype:
    """Sums over many images: float64 costs nothing here, where there is one number for each pair of views."""
    return torch.float64 if tensor.device.type == "cpu" else tensor.dtype
