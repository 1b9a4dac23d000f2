"""The cross-entropies of all pairs from the inputs of the last layer: all logits never lie in memory together.

Both passes go through the prototypes slice by slice. Forward, a running log-sum-exp gathers what the softmax of every
row needs, and dot products of teacher and student follow along, scaled by the teacher's running maximum. Backward makes
the logits of a slice again, turns them into their gradient in place, and multiplies that into the gradients of the rows
and, through the weight norm, of the parameters. So a step holds some [rows, slice] at a time instead of several
[rows, K] (rows: V*B of the student, G*B of the teacher).

Shapes: B images, G global views, V views, K prototypes, k of them in a slice, b bottleneck.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dino.loss.fused import logits_gradient_
from dino.loss.precision import at_least_float32
from dino.model.projection import Projection, column_scales, direction_gradient, slices


@dataclass(frozen=True)
class SlicedSettings:
    num_global_views: int
    student_temp: float
    teacher_temp: float


def sliced_cross_entropies(
    student: Projection, teacher: Projection, center: Tensor, settings: SlicedSettings
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of every student view, [V] (as `fused_cross_entropies`), and the sum of all teacher
    logits, [1, K], without gradient.

    Args:
        student: V*B rows.
        teacher: G*B rows.
        center: [1, K], subtracted from the teacher's logits.
        settings: number of global views, temperatures.
    """
    of_student = student.rows, student.directions, student.gains
    of_teacher = teacher.rows, teacher.directions, teacher.gains
    losses, logits_sum = _SlicedCrossEntropies.apply(*of_student, *of_teacher, center, settings)
    return losses, logits_sum


class _SlicedCrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        directions: Tensor,
        gains: Tensor,
        teacher_rows: Tensor,
        teacher_directions: Tensor,
        teacher_gains: Tensor,
        center: Tensor,
        settings: SlicedSettings,
    ) -> tuple[Tensor, Tensor]:
        scales, teacher_scales = column_scales(directions, gains), column_scales(teacher_directions, teacher_gains)
        number = settings.num_global_views
        batch = len(teacher_rows) // number
        num_views = len(rows) // batch
        student_lse = scales.new_full((num_views, batch), -torch.inf)
        largest = scales.new_full((number, batch), -torch.inf)  # of the teacher, so far
        sums = scales.new_zeros(number, batch)  # of exp(teacher - largest)
        dots = scales.new_zeros(batch, number, num_views)  # of exp(teacher - largest) and the student's logits
        logits_sum = scales.new_empty(1, len(scales))
        for part in slices(len(scales)):
            raw = _logits(teacher_rows, teacher_directions[part], teacher_scales[part])
            logits_sum[:, part] = raw.sum(dim=0, keepdim=True)
            t = raw.sub_(center[:, part]).div_(settings.teacher_temp).view(number, batch, -1)
            s = _logits(rows, directions[part], scales[part]).div_(settings.student_temp).view(num_views, batch, -1)
            student_lse = torch.logaddexp(student_lse, s.logsumexp(dim=-1))
            before, largest = largest, torch.maximum(largest, t.amax(dim=-1))
            shrunk = (before - largest).exp_()  # 0 at the first slice
            e = t.sub_(largest[..., None]).exp_()
            sums = sums.mul_(shrunk).add_(e.sum(dim=-1))
            dots = dots.mul_(shrunk.T[..., None]).add_(torch.bmm(e.transpose(0, 1), s.permute(1, 2, 0)))
        teacher_lse = largest + sums.log()
        # -sum p (s - lse) = lse - dot, for every pair but those of a view with itself
        pairs = student_lse.T[:, None] - dots / sums.T[..., None]  # [B, G, V]
        losses = pairs.mean(dim=0)
        losses.diagonal().zero_()
        of_student, of_teacher = (rows, directions, scales), (teacher_rows, teacher_directions, teacher_scales)
        ctx.save_for_backward(*of_student, *of_teacher, center, student_lse, teacher_lse)
        ctx.settings = settings
        ctx.mark_non_differentiable(logits_sum)
        return losses.sum(dim=0), logits_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, directions, scales, *of_teacher, center, student_lse, teacher_lse = ctx.saved_tensors
        teacher_rows, teacher_directions, teacher_scales = of_teacher
        settings: SlicedSettings = ctx.settings
        _, of_directions, of_gains, *_ = ctx.needs_input_grad
        gradient_rows = scales.new_zeros(rows.shape)
        gradient_v = torch.empty_like(directions) if of_directions else None
        gradient_g = torch.empty_like(scales)[:, None] if of_gains else None
        num_views, batch = student_lse.shape
        factors = (gradient / (batch * settings.student_temp)).to(scales)[:, None, None]  # [V, 1, 1]
        for part in slices(len(scales)):
            t = _logits(teacher_rows, teacher_directions[part], teacher_scales[part]).sub_(center[:, part])
            p = t.div_(settings.teacher_temp).view(*teacher_lse.shape, -1).sub_(teacher_lse[..., None]).exp_()
            s = _logits(rows, directions[part], scales[part]).div_(settings.student_temp)
            q = s.view(num_views, batch, -1).sub_(student_lse[..., None]).exp_()
            of_logits = logits_gradient_(q, p, factors).flatten(0, 1)  # [V*B, k]
            if of_directions or of_gains:
                products = (of_logits.to(rows.dtype).T @ rows).to(scales.dtype)
                part_v, part_g = direction_gradient(products, directions[part], scales[part])
                if gradient_v is not None:
                    gradient_v[part] = part_v
                if gradient_g is not None:
                    gradient_g[part] = part_g
            gradient_rows += of_logits.mul_(scales[part]).to(rows.dtype) @ directions[part].to(rows.dtype)
        return gradient_rows.to(rows.dtype), gradient_v, gradient_g, None, None, None, None, None


def _logits(rows: Tensor, directions: Tensor, scales: Tensor) -> Tensor:
    """`[N, k]` in float32 at least, of products in the type of the rows."""
    return at_least_float32(rows @ directions.to(rows.dtype).T).mul_(scales)
