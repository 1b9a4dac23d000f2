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

from dino.linear import product
from dino.loss.fused import put_raw_gradient, row_factors, softmax_and_log_sum_exp, stored_scale
from dino.loss.precision import at_least_float32
from dino.model.projection import DirectionGradients, Projection, scaled_prototypes, slices


@dataclass(frozen=True)
class SlicedSettings:
    num_global_views: int
    student_temp: float
    teacher_temp: float


def sliced_cross_entropies(
    student: Projection, teacher: Projection, center: Tensor, settings: SlicedSettings
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of every student view, [V] (as `cross_entropies_of_logits`), and the sum of all teacher
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
        lengths, teacher_lengths = (torch.linalg.vector_norm(v, dim=1) for v in (directions, teacher_directions))
        scales = gains[:, 0] / (lengths * settings.student_temp)
        teacher_scales = teacher_gains[:, 0] / teacher_lengths
        number = settings.num_global_views
        batch = len(teacher_rows) // number
        num_views = len(rows) // batch
        student_lse = scales.new_full((num_views, batch), -torch.inf)
        largest = scales.new_full((number, batch), -torch.inf)  # of the teacher, so far
        sums = scales.new_zeros(number, batch)  # of exp(teacher - largest)
        dots = scales.new_zeros(batch, number, num_views)  # of exp(teacher - largest) and the student's logits
        logits_sum = scales.new_empty(1, len(scales))
        for part in slices(len(scales)):
            raw = _scores(teacher_rows, teacher_directions[part], teacher_scales[part])
            logits_sum[:, part] = raw.sum(dim=0, keepdim=True)
            t = raw.sub_(center[:, part]).div_(settings.teacher_temp).view(number, batch, -1)
            s = _scores(rows, directions[part], scales[part]).view(num_views, batch, -1)
            student_lse = torch.logaddexp(student_lse, softmax_and_log_sum_exp(s)[1])
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
        of_student, of_teacher = (rows, directions, gains, lengths), (teacher_rows, teacher_directions, teacher_scales)
        ctx.save_for_backward(*of_student, *of_teacher, center, student_lse, teacher_lse)
        ctx.settings = settings
        ctx.mark_non_differentiable(logits_sum)
        return losses.sum(dim=0), logits_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, directions, gains, lengths, *of_teacher, center, student_lse, teacher_lse = ctx.saved_tensors
        teacher_rows, teacher_directions, teacher_scales = of_teacher
        settings: SlicedSettings = ctx.settings
        scale = stored_scale(rows.dtype)
        factors = row_factors(gradient, rows, scale)
        weighted = (rows * (factors / settings.student_temp)).to(rows.dtype)
        scales = gains[:, 0] / (lengths * settings.student_temp)
        found = DirectionGradients(directions, gains, lengths, ctx.needs_input_grad[1:3])
        of_rows = scales.new_zeros(rows.shape)
        for part in slices(len(scales)):
            t = _scores(teacher_rows, teacher_directions[part], teacher_scales[part]).sub_(center[:, part])
            p = t.div_(settings.teacher_temp).view(*teacher_lse.shape, -1).sub_(teacher_lse[..., None]).exp_()
            prototypes = scaled_prototypes(directions[part], scales[part], rows.dtype)
            s = at_least_float32(product(rows, prototypes)).view(*student_lse.shape, -1)
            raw = torch.empty(len(rows), p.shape[-1], dtype=rows.dtype, device=rows.device)
            put_raw_gradient(s.sub_(student_lse[..., None]).exp_(), p, raw.view(s.shape), scale)
            found.put(part, raw, weighted)
            of_rows += raw @ prototypes
        of_rows = of_rows.mul_(factors).to(rows.dtype)
        return of_rows, found.of_directions, found.of_gains, None, None, None, None, None


def _scores(rows: Tensor, directions: Tensor, scales: Tensor) -> Tensor:
    """`[N, k]` in float32 at least, of products in the type of the rows."""
    return at_least_float32(product(rows, scaled_prototypes(directions, scales, rows.dtype)))
