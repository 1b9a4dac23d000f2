"""How good features are without any label: what they fill, and whether the views of an image find each other.

Shapes: N images, B images in a batch, D features.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dino import preemption, ranks
from dino.backbone.base import check_at_least
from dino.dataset import Source, spread_indices
from dino.evaluation.features import evaluation_mode, extract_features
from dino.evaluation.held_out_views import held_out_views, in_batches
from dino.evaluation.inputs import EvaluationInputs, FeatureInputs
from dino.evaluation.knn import QUERY_CHUNK, nearest_neighbours
from dino.evaluation.splits import Once, evaluation_loader, held_out_or_training, limited, smaller
from dino.run import NonFiniteFeaturesError


@dataclass(kw_only=True)
class RankEvaluator:
    """How many dimensions the features fill, of the same held-out images every time; labels are not looked at.

    - `val/effective_rank`: how many dimensions they fill, higher is better. RankMe (Garrido et al. 2023,
      arXiv:2210.02885). A collapse, full or of some dimensions, shows as a fall towards 1. It is bounded by the number
      of images as well as by the features' dimension, so values of different networks compare by their share of what
      is attainable, `val/effective_rank_ratio` = effective rank / min(N, D), at the same N.
    - `val/feature_std`: how far they are spread over the sphere, from 0 (all equal) to 1; see `feature_std`.

    The backbone runs in evaluation mode. Under several ranks every one gets the values that a single process would.

    Args:
        every_epochs: period; read by the trainer.
        prefix: what the names of the metrics begin with.
        max_samples: at most so many held-out images, spread over the split; training images where none are held out.

    Raises:
        ValueError: for a number out of its range, naming the key.
    """

    every_epochs: int = 10
    prefix: str = "val"
    max_samples: int = 2048
    _once: Once = field(default_factory=Once, init=False, repr=False)
    _option: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        owner = f"evaluation.{self._option}"
        check_at_least(owner, 1, every_epochs=self.every_epochs, max_samples=self.max_samples)

    def evaluate(self, inputs: FeatureInputs) -> dict[str, float]:
        """All three values.

        Raises:
            ValueError: no image that can be read.
            NonFiniteFeaturesError: for features that are not finite.
            Preempted: a signal came to this rank or another.
        """
        if inputs.dataset.evaluation() is None:
            name = inputs.dataset.name
            self._once.say(f"label-free quality of training images: dataset {name} has no held-out split")
        source = limited(held_out_or_training(inputs.dataset), smaller(self.max_samples, inputs.limit_samples))
        mean, std = inputs.dataset.normalization()
        loader = evaluation_loader(source, inputs.dataset)
        features, _ = extract_features(inputs.backbone, loader, inputs.device, inputs.autocast, mean=mean, std=std)
        rank = effective_rank(features)
        return {
            f"{self.prefix}/effective_rank": rank,
            f"{self.prefix}/effective_rank_ratio": rank / min(features.shape),
            f"{self.prefix}/feature_std": feature_std(features),
        }


@dataclass(kw_only=True)
class LabelFreeEvaluator(RankEvaluator):
    """What `RankEvaluator` measures, and whether the views of an image find each other:

    `val/view_retrieval_top1` [%]: for how many images the first global view is nearer (cosine similarity) to the
    second global view of the same image than to that of any other. Chance, and features that are all equal, give
    100 / N. The views are those of training, drawn once and for all.
    """

    _option: ClassVar[str] = "label_free"

    def evaluate(self, inputs: EvaluationInputs) -> dict[str, float]:  # type: ignore[override]  # needs a run
        """All four values; raises as `RankEvaluator.evaluate`."""
        source = held_out_or_training(inputs.dataset)
        views = self._view_features(inputs, source, smaller(self.max_samples, inputs.limit_samples))
        return super().evaluate(inputs) | {f"{self.prefix}/view_retrieval_top1": retrieval_top1(*views, inputs.device)}

    def _view_features(self, inputs: EvaluationInputs, source: Source, limit: int | None) -> tuple[Tensor, Tensor]:
        """The teacher's features of the first and of the second global view, two [N, D] in float32 on the CPU."""
        batches = in_batches(spread_indices(len(source), limit), inputs.dataset.batch_size)
        batches = batches[ranks.own_part(len(batches))]
        # A view depends on no other one, so the global views are the same without the local ones.
        augmentation = dataclasses.replace(inputs.augmentation, num_local_views=0)
        views = held_out_views(inputs, source, batches, self._once, augmentation=augmentation)
        backbone = inputs.backbone
        pairs: list[Tensor] = []  # [B, 2, D] each
        with torch.inference_mode(), evaluation_mode(backbone):
            for batch in preemption.until_requested(views):
                with inputs.autocast():
                    both = backbone(batch.global_views.flatten(0, 1))  # [2 * B, D], view-major
                pairs.append(torch.stack(both.float().cpu().chunk(2), dim=1))
        preemption.check()
        first, second = ranks.gather_rows(torch.cat(pairs) if pairs else torch.empty(0)).unbind(dim=1)
        return first, second


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values [min(N, D)] after division by their sum: from 1 to min(N, D).

    As in RankMe the features [N, D] are neither centered nor normalised. Computed in float64, where a singular value of
    0 needs no epsilon; features that are all 0 count as rank 1, as other constant ones.

    Raises:
        NonFiniteFeaturesError: for features that are not finite.
    """
    if not features.isfinite().all():
        raise NonFiniteFeaturesError("effective rank")
    singular_values = torch.linalg.svdvals(features.double())
    shares = singular_values / singular_values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    rank: float = torch.special.entr(shares).sum().exp().item()
    return min(max(rank, 1.0), float(min(features.shape)))  # beyond these only by rounding


def feature_std(features: Tensor) -> float:
    """Standard deviation over images of the L2-normalised features [N, D], mean over dimensions, times sqrt(D).

    1 where they are spread evenly over the sphere, 0 where all point the same way (SimSiam, Chen & He 2021, section 4).
    """
    std = normalize(features.double(), dim=1).std(dim=0, correction=0)
    return std.mean().item() * math.sqrt(features.shape[1])


def retrieval_top1(queries: Tensor, bank: Tensor, device: torch.device) -> float:
    """Share [%] of the queries [N, D] whose nearest row of the bank [N, D] is the one of the same number.

    Of equally near rows the first counts. Compared piece by piece on `device`. Under several ranks all call it with the
    same features; each looks up its own part of the queries.

    Raises:
        NonFiniteFeaturesError: for features that are not finite.
        Preempted: a signal came to this rank or another.
    """
    if not (queries.isfinite().all() and bank.isfinite().all()):
        raise NonFiniteFeaturesError("view retrieval")
    own = ranks.own_part(len(queries), QUERY_CHUNK)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        _, rows = nearest_neighbours(bank, queries[own], 1, device=device)
    hits = int((rows[:, 0].cpu() == torch.arange(len(queries))[own]).sum())
    return 100.0 * sum(ranks.gather_objects(hits)) / len(queries)
