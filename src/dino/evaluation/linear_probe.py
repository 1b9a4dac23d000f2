"""Linear classification of features (paper, section 4.1; original: eval_linear.py): several learning rates at once.

Shapes: N images, B images in a batch, D features, C classes, R learning rates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dino import preemption
from dino.evaluation.progress import telling_progress
from dino.run import NonFiniteFeaturesError

MOMENTUM = 0.9  # of the original, which has no weight decay
INITIAL_STD = 0.01
CHUNK = 8192  # rows that are classified at a time


@dataclass(frozen=True)
class LinearProbes:
    """One linear classifier for each learning rate."""

    weight: Tensor  # [R, C, D]
    bias: Tensor  # [R, C]

    def hits(self, features: Tensor, labels: Tensor, within: int = 1) -> Tensor:
        """[R] int64: how many of the features [N, D] have their label [N] among the `within` largest outputs."""
        counts = torch.zeros(len(self.weight), dtype=torch.int64)
        for rows, targets in zip(torch.split(features, CHUNK), torch.split(labels, CHUNK), strict=True):
            logits = self.logits(rows.to(self.weight))  # [R, n, C]
            of_target = logits.gather(2, targets.to(logits.device).expand(len(logits), -1)[..., None])
            # Not `>`: a probe that has diverged gives NaN, which must be no hit.
            counts += ((~(logits <= of_target)).sum(dim=2) < within).sum(dim=1).cpu()
        return counts

    def logits(self, features: Tensor) -> Tensor:
        """[n, D] -> [R, n, C]."""
        return torch.baddbmm(self.bias[:, None], features.expand(len(self.weight), -1, -1), self.weight.transpose(1, 2))


def train_probes(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    learning_rates: Sequence[float],
    *,
    epochs: int = 100,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | None = None,
) -> LinearProbes:
    """SGD with momentum 0.9 on the cross-entropy, rates falling by a cosine to 0, one value an epoch.

    All probes start from the same weights and see the same batches; each is what it would be alone. The last batch of
    an epoch may be smaller. A signal cuts training short; `preemption.check` is to follow.

    Args:
        features: [N, D], of any floating type; computed with in float32.
        labels: [N], whole numbers from 0 to C - 1.
        learning_rates: R of them, as they are (the original scales its 0.001 by the batch size / 256).
        seed: of weights and order.
        device: where the probes are trained; None: where the features are. Moved there: one batch at a time.

    Raises:
        NonFiniteFeaturesError: for features that are not finite.
    """
    if not features.isfinite().all():
        raise NonFiniteFeaturesError("the linear probe")
    device = features.device if device is None else device
    generator = torch.Generator().manual_seed(seed)
    initial = torch.randn(num_classes, features.shape[1], generator=generator) * INITIAL_STD
    rates = torch.tensor(learning_rates, device=device)
    weight = initial.to(device).repeat(len(rates), 1, 1).requires_grad_()
    bias = torch.zeros(len(rates), num_classes, device=device, requires_grad=True)
    # A rate times the gradient is the rate times the step, with momentum too; so all probes are one tensor.
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in telling_progress(preemption.until_requested(range(epochs)), epochs, "epochs of linear probes"):
        for rows in torch.split(torch.randperm(len(features), generator=generator), batch_size):
            batch, targets = features[rows].to(device, torch.float32), labels[rows].to(device)
            logits = F.linear(batch, weight.flatten(0, 1), bias.flatten()).view(-1, num_classes)  # [B * R, C]
            losses = F.cross_entropy(logits, targets.repeat_interleave(len(rates)), reduction="none")
            optimizer.zero_grad()
            # The sum over the probes: none of them is in the loss of another.
            torch.autograd.backward((losses.view(-1, len(rates)).mean(dim=0) * rates).sum())
            optimizer.step()
        schedule.step()
    return LinearProbes(weight.detach(), bias.detach())
