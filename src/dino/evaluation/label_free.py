"""How good features are without any label: how many dimensions they fill.

Shapes: N images, D features.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dino.dataset import Source
from dino.evaluation.features import extract_features
from dino.evaluation.inputs import EvaluationInputs
from dino.evaluation.splits import Once, evaluation_loader, limited, smaller


@dataclass(kw_only=True)
class LabelFreeEvaluator:
    """How many dimensions the teacher's features fill: `val/effective_rank`, higher is better.

    RankMe (Garrido et al. 2023, arXiv:2210.02885). A collapse, full or of some dimensions, shows as a fall towards 1.

    It is bounded by the number of images as well as by the features' dimension, so values of different networks compare
    by their share of what is attainable, `val/effective_rank_ratio` = effective rank / min(N, D), at the same N.

    Args:
        every_epochs: period; read by the trainer.
        max_samples: at most so many held-out images, spread over the split; training images where none are held out.

    Raises:
        ValueError: for a number out of its range, naming the key.
    """

    every_epochs: int = 10
    max_samples: int = 2048
    _once: Once = field(default_factory=Once, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("every_epochs", "max_samples"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"evaluation.label_free.{name}={getattr(self, name)}: use a whole number of at least 1"
                )

    def evaluate(self, inputs: EvaluationInputs) -> dict[str, float]:
        """Both values; labels are not looked at.

        Raises:
            ValueError: features that are not finite, or no image that can be read.
            Preempted: a signal came to this rank or another.
        """
        source = limited(self._images(inputs), smaller(self.max_samples, inputs.limit_samples))
        mean, std = inputs.dataset.normalization()
        loader = evaluation_loader(source, inputs.dataset)
        backbone = inputs.model.teacher.backbone
        features, _ = extract_features(backbone, loader, inputs.device, inputs.autocast, mean=mean, std=std)
        rank = effective_rank(features)
        return {"val/effective_rank": rank, "val/effective_rank_ratio": rank / min(features.shape)}

    def _images(self, inputs: EvaluationInputs) -> Source:
        splits = inputs.dataset.evaluation()
        if splits is not None:
            return splits[1]
        name = inputs.dataset.name
        self._once.say(f"effective rank of training images: dataset {name} has no held-out split")
        return inputs.dataset.train()


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values [min(N, D)] after division by their sum: from 1 to min(N, D).

    As in RankMe the features [N, D] are neither centered nor normalised. Computed in float64, where a singular value of
    0 needs no epsilon; features that are all 0 count as rank 1, as other constant ones.

    Raises:
        ValueError: for features that are not finite.
    """
    if not features.isfinite().all():
        raise ValueError("effective rank got features that are not finite: the network that made them has diverged")
    singular_values = torch.linalg.svdvals(features.double())
    shares = singular_values / singular_values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    rank: float = torch.special.entr(shares).sum().exp().item()
    return min(max(rank, 1.0), float(min(features.shape)))  # beyond these only by rounding
