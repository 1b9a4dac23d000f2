"""The DINO loss on held-out images.

Shapes: B images in a batch, G global views, V all views, K prototypes.
"""

import copy
import itertools
from dataclasses import dataclass, field

import torch

from dino import preemption, ranks
from dino.augmentation import ViewBatch
from dino.backbone.base import check_at_least
from dino.dataset import spread_indices
from dino.evaluation.features import evaluation_mode
from dino.evaluation.held_out_views import held_out_views, in_batches
from dino.evaluation.inputs import EvaluationInputs
from dino.evaluation.splits import Once, smaller
from dino.loss import DINOLoss, LossTerms


@dataclass(kw_only=True)
class ValidationLossEvaluator:
    """The training loss on held-out images: `val/loss`, `val/loss_global`, `val/loss_local` (without local views: not).

    The views are those of training, drawn once and for all: their randomness is that of epoch 0, so a change of the
    value is a change of the network, the center or the teacher temperature. Note that the loss of DINO is no measure of
    progress by itself: its target moves, and it can fall while the features collapse.

    Student and teacher run in evaluation mode: without drop path or dropout, hence without a draw from a global random
    stream, and with the running statistics of batch norm. The loss works on a copy of the loss module, so the center is
    the one of the run and stays as it is.

    Under several ranks each takes some of the batches, and every rank gets the value that a single process would.

    Args:
        every_epochs: period; read by the trainer.
        prefix: what the names of the metrics begin with.
        max_samples: at most so many held-out images, spread over the split.

    Raises:
        ValueError: for a number out of its range, naming the key.
    """

    every_epochs: int = 10
    prefix: str = "val"
    max_samples: int = 2048
    _once: Once = field(default_factory=Once, init=False, repr=False)

    def __post_init__(self) -> None:
        check_at_least("evaluation.validation_loss", 1, every_epochs=self.every_epochs, max_samples=self.max_samples)

    def evaluate(self, inputs: EvaluationInputs) -> dict[str, float]:
        """Means over the held-out images; empty, with one line in the log, where there is no held-out split.

        Raises:
            Preempted: a signal came to this rank or another.
        """
        splits = inputs.dataset.evaluation()
        if splits is None:
            self._once.say(f"no validation loss: dataset {inputs.dataset.name} has no held-out split")
            return {}
        loss = copy.deepcopy(inputs.loss).eval()
        indices = spread_indices(len(splits[1]), smaller(self.max_samples, inputs.limit_samples))
        batches = in_batches(indices, inputs.dataset.batch_size)
        batches = batches[ranks.own_part(len(batches))]
        own: list[tuple[int, dict[str, float]]] = []  # of each batch: B and its losses
        # Some ranks may have a batch less, so inside none may wait for the others.
        with torch.inference_mode(), evaluation_mode(inputs.model), ranks.alone():
            for views in preemption.until_requested(held_out_views(inputs, splits[1], batches, self._once)):
                terms = _loss_terms(inputs, loss, views)
                named = {"loss": terms.total, "loss_global": terms.global_term, "loss_local": terms.local_term}
                losses = {name: value.item() for name, value in named.items() if value is not None}
                own.append((views.global_views.shape[1], losses))
        preemption.check()
        sums: dict[str, float] = {}
        num_images = 0
        for batch_size, losses in itertools.chain(*ranks.gather_objects(own)):
            for name, value in losses.items():
                # A batch's loss is the mean over its images, so weighting by B makes the last one count right.
                sums[name] = sums.get(name, 0.0) + batch_size * value
            num_images += batch_size
        if num_images == 0:
            self._once.say(f"no validation loss: no held-out image of dataset {inputs.dataset.name} can be read")
        return {f"{self.prefix}/{name}": total / num_images for name, total in sums.items()}


def _loss_terms(inputs: EvaluationInputs, loss: DINOLoss, views: ViewBatch) -> LossTerms:
    with inputs.autocast():
        teacher = inputs.model.teacher_forward(views.global_views)
        student, features = inputs.model.student_forward(views.global_views, views.local_views)
    terms: LossTerms = loss(student, teacher, len(views.global_views), inputs.teacher_temp, features)
    return terms
