"""The cross-entropies of all pairs from whole logits, without copies of them.

Some images are handled at a time, so that what is made of their logits stays in a cache. Their gradient is made in the
same visit and kept for the backward pass, in the place of the logits where nobody else sees them.

Shapes: B images, G global views, V views, N = V*B rows, c images of a chunk, K prototypes, b bottleneck. Rows are
view-major.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dino.linear import product
from dino.loss.precision import at_least_float32
from dino.model.projection import DirectionGradients, Projection, logits_at_a_time, scaled_prototypes, slices


def cross_entropies_of_logits(logits: Tensor, targets: Tensor, num_global_views: int, temp: float) -> Tensor:
    """Student logits [N, K] and targets [G*B, K] to the mean cross-entropy of every student view, [V].

    For a view it is the mean over images of the sum over all teacher views but the same one, so the global ones have
    G - 1 of them and the local ones G.

    Args:
        logits: with gradient; in any type, arithmetic is in float32 at least.
        targets: probabilities, no gradient.
        num_global_views: G.
        temp: temperature of the student.
    """
    losses: Tensor = _OfLogits.apply(logits, targets, num_global_views, temp)
    return losses


def cross_entropies_of_projection(student: Projection, targets: Tensor, num_global_views: int, temp: float) -> Tensor:
    """The same from what logits are made of; the gradient takes the place of the logits."""
    parameters = student.directions, student.gains
    losses: Tensor = _OfProjection.apply(student.rows, *parameters, targets, num_global_views, temp)
    return losses


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, num_global_views: int, temp: float) -> Tensor:
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        batch = len(targets) // num_global_views
        num_pairs = num_global_views * (len(logits) // batch - 1)
        ctx.temp, ctx.scale = temp, stored_scale(logits.dtype)
        if ctx.scale == 1:  # what is kept is already the gradient that the mean of all pairs asks for
            ctx.scale = -1 / (num_pairs * batch * temp)
        losses = _visit(logits, targets, num_global_views, temp, gradient, ctx.scale)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (of_logits,) = ctx.saved_tensors
        factors = row_factors(gradient / ctx.temp, of_logits, ctx.scale)
        # One more visit of all logits. On a GPU asking costs more: the host would wait for the answer.
        is_finished = factors.device.type == "cpu" and (factors - 1).abs().max() < 4 * torch.finfo(factors.dtype).eps
        return of_logits if is_finished else of_logits.mul_(factors), None, None, None


class _OfProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, directions: Tensor, gains: Tensor, targets: Tensor, num_global_views: int, temp: float
    ) -> Tensor:
        lengths = torch.linalg.vector_norm(directions, dim=1)
        prototypes = scaled_prototypes(directions, gains[:, 0] / (lengths * temp), rows.dtype)
        logits = product(rows, prototypes)  # divided by the temperature
        place = logits if any(ctx.needs_input_grad) else None
        ctx.temp, ctx.scale = temp, stored_scale(rows.dtype)
        losses = _visit(logits, targets, num_global_views, 1.0, place, ctx.scale)
        ctx.save_for_backward(rows, directions, gains, lengths, prototypes, logits)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, directions, gains, lengths, prototypes, of_logits = ctx.saved_tensors
        factors = row_factors(gradient, rows, ctx.scale)
        found = DirectionGradients(directions, gains, lengths, ctx.needs_input_grad[1:3])
        weighted = (rows * (factors / ctx.temp)).to(rows.dtype)
        for part in slices(len(directions)):
            found.put(part, of_logits[:, part], weighted)
        of_rows = ((of_logits @ prototypes) * factors).to(rows.dtype)
        return of_rows, found.of_directions, found.of_gains, None, None, None


def _visit(
    logits: Tensor, targets: Tensor, num_global_views: int, temp: float, gradient: Tensor | None, scale: float
) -> Tensor:
    """The losses [V] of logits [N, K]; puts `put_raw_gradient` into `gradient`, which may be the logits themselves."""
    teacher = targets.view(num_global_views, -1, targets.shape[-1])
    student = logits.view(-1, *teacher.shape[1:])
    num_views, batch, num_prototypes = student.shape
    sums = targets.new_zeros(num_global_views, num_views, dtype=_sum_type(targets))
    at_a_time = max(1, logits_at_a_time(student.device) // (num_views * num_prototypes))  # images
    for part in slices(batch, at_a_time):
        scores = at_least_float32(student[:, part])
        scores = scores if temp == 1 else scores / temp  # [V, c, K]
        q, lse = softmax_and_log_sum_exp(scores)
        p = teacher[:, part]
        products = _products(p, scores.to(p))  # -sum p (score - lse) = sum p * lse - sum p * score
        sums += (p.sum(dim=-1).T[..., None] * lse.T[:, None] - products).sum(dim=0)
        if gradient is not None:
            put_raw_gradient(q, p, gradient.view(student.shape)[:, part], scale)
    sums.diagonal().zero_()  # the same view of the same image
    return (sums.sum(dim=0) / batch).to(targets)


def _products(p: Tensor, scores: Tensor) -> Tensor:
    """sum over K of p * score: [G, c, K], [V, c, K] -> [c, G, V]. Of one image as a product for each view, which finds
    its row where the softmax has left it: a core takes whole views there, and would take half of K in a single one."""
    if scores.shape[1] == 1:
        of_views = torch.bmm(scores, p[:, 0].T.expand(len(scores), -1, -1))  # [V, 1, G]
        return of_views.permute(1, 2, 0)
    return torch.bmm(p.transpose(0, 1), scores.permute(1, 2, 0))


def softmax_and_log_sum_exp(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Over the last dimension, `[..., k]` -> `[..., k]`, `[...]`. One exponential of each score, as the largest
    probability is 1 / sum exp(score - largest); on a CPU that takes a fraction of torch.logsumexp."""
    q = torch.softmax(scores, dim=-1)
    return q, scores.amax(dim=-1) - q.amax(dim=-1).log()


def put_raw_gradient(q: Tensor, p: Tensor, place: Tensor, scale: float) -> None:
    """Student [V, c, k] and teacher [G, c, k] probabilities to minus the gradient of a view's cross-entropies by its
    scores (logits / temperature), before the mean over images, times `scale`: in `place`, like `q`.

    That is the sum of the view's G or G - 1 teacher views minus as many q.
    """
    num_global_views = len(p)
    p = p if scale == 1 else p * scale
    total = p.sum(dim=0)
    torch.sub(total, q[num_global_views:], alpha=num_global_views * scale, out=place[num_global_views:])
    for j, view in enumerate(q[:num_global_views]):
        others = p[1 - j] if num_global_views == 2 else total - p[j]
        torch.sub(others, view, alpha=(num_global_views - 1) * scale, out=place[j])


def row_factors(gradient: Tensor, rows: Tensor, scale: float) -> Tensor:
    """What the raw gradient of the N rows, stored times `scale`, is multiplied with: [N, 1], from the gradient [V] of
    the losses, in float32 at least."""
    batch = len(rows) // len(gradient)
    factors = (gradient / (-batch * scale)).repeat_interleave(batch, output_size=len(rows))
    return factors[:, None].to(at_least_float32(rows[:0]).dtype)


def stored_scale(dtype: torch.dtype) -> float:
    """fp16 knows no 1e-8, which is what many prototypes ask of a row: loss scaling comes too late for what is kept from
    the forward pass. A row's gradient, at most twice its largest score, stays far below the largest number."""
    return 2.0**8 if dtype == torch.float16 else 1.0


def _sum_type(tensor: Tensor) -> torch.dtype:
    """Sums over many images: float64 costs nothing here, where there is one number for each pair of views."""
    return torch.float64 if tensor.device.type == "cpu" else tensor.dtype
