"""The linear probe of a backbone on a dataset.

Shapes: N images, C channels, H x W pixels, T tokens, D features of the backbone, D' of the probe.
"""

import logging
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dino import preemption, ranks
from dino.backbone import Backbone
from dino.backbone.base import check_at_least
from dino.dataset import Source
from dino.evaluation.features import evaluation_mode, extract_features
from dino.evaluation.inputs import FeatureInputs
from dino.evaluation.linear_probe import train_probes
from dino.evaluation.splits import Once, evaluation_loader, limited, smaller

log = logging.getLogger("dino")

NAME = "evaluation.linear"


@dataclass(kw_only=True)
class LinearEvaluator:
    """Trains linear classifiers on frozen features of the training images and tests them on the held-out ones.

    As the original's protocol (eval_linear.py): the class tokens of the last blocks beside each other, with the mean of
    the patch tokens if wanted, SGD with momentum and a cosine; backbones without class tokens give their features. Two
    things differ, so that it costs minutes and no choice is made on the held-out images: features are computed once,
    of the images as evaluation sees them (the original trains on random crops and flips), and the learning rate is
    chosen on a part of the training images, then the probe is trained anew on all of them.

    `val/linear_top1` and `val/linear_top5` [%] are means over the seeds, `val/linear_top1_std` is the deviation of the
    first over them.

    Args:
        every_epochs: period; read by the trainer.
        prefix: what the names of the metrics begin with.
        num_last_blocks: class tokens of so many blocks (paper: 4 for ViT-S, 1 for ViT-B), fewer where there are fewer.
        average_patches: whether the mean patch token of the last block comes on top (paper: for ViT-B).
        epochs, batch_size: of the probe.
        learning_rates: among which the best is chosen, for a batch of 256: each is scaled by batch_size / 256.
        num_seeds: probes that are trained, each with its own beginning, order and learning rate.
        choice_fraction: share of the training images on which the learning rate is chosen.
        max_train: at most so many training images; None: all.

    Raises:
        ValueError: for a number out of its range, naming the key.
    """

    every_epochs: int = 100
    prefix: str = "val"
    num_last_blocks: int = 4
    average_patches: bool = False
    epochs: int = 100
    batch_size: int = 128
    learning_rates: list[float] = field(default_factory=lambda: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
    num_seeds: int = 3
    choice_fraction: float = 0.1
    max_train: int | None = None
    _once: Once = field(default_factory=Once, init=False, repr=False)

    def __post_init__(self) -> None:
        check_at_least(NAME, 1, every_epochs=self.every_epochs, num_last_blocks=self.num_last_blocks)
        check_at_least(NAME, 1, epochs=self.epochs, batch_size=self.batch_size, num_seeds=self.num_seeds)
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"{NAME}.learning_rates={self.learning_rates}: list one or more numbers above 0")
        if not 0 < self.choice_fraction < 1:
            raise ValueError(f"{NAME}.choice_fraction={self.choice_fraction}: use a share between 0 and 1, such as 0.1")
        if self.max_train is not None and self.max_train < 2:
            raise ValueError(f"{NAME}.max_train={self.max_train}: use a whole number of at least 2, or null")

    def evaluate(self, inputs: FeatureInputs) -> dict[str, float]:
        """Metrics in percent; none, with one line in the log, where labels or a held-out split are missing.

        Raises:
            ValueError: features that are not finite, or too few images.
            Preempted: a signal came to this rank or another.
        """
        splits = inputs.dataset.evaluation()
        if splits is None or splits[0].labels is None or splits[1].labels is None:
            self._once.say(f"no linear probe: dataset {inputs.dataset.name} has no labelled held-out split")
            return {}
        train, held_out = splits
        train = limited(train, smaller(inputs.limit_samples, self.max_train))
        features, labels = self._features(inputs, train)
        tested = self._features(inputs, limited(held_out, inputs.limit_samples))
        num_classes = inputs.dataset.num_classes
        assert num_classes is not None
        # Each rank trains some of the probes, from start to end.
        own = range(self.num_seeds)[ranks.own_part(self.num_seeds)]
        with ranks.alone():
            found = [
                self._probe(features, labels, *tested, num_classes, seed, inputs.device)
                for seed in preemption.until_requested(own)
            ]
        preemption.check()
        results = [result for of_rank in ranks.gather_objects(found) for result in of_rank]
        rates = ", ".join(f"{rate:g}" for rate, _, _ in results)
        self._once.say(f"linear probe: learning rates {rates} of {self.learning_rates} were chosen")
        top1, top5 = ([result[place] for result in results] for place in (1, 2))
        deviation = statistics.stdev(top1) if len(top1) > 1 else 0.0
        inputs.write("linear", {"learning_rates": [rate for rate, _, _ in results], "top1": top1, "top5": top5})
        return {
            f"{self.prefix}/linear_top1": statistics.mean(top1),
            f"{self.prefix}/linear_top5": statistics.mean(top5),
            f"{self.prefix}/linear_top1_std": deviation,
        }

    def _features(self, inputs: FeatureInputs, source: Source) -> tuple[Tensor, Tensor]:
        """[N, D'] and labels [N], on the CPU."""
        mean, std = inputs.dataset.normalization()
        backbone = inputs.backbone
        with evaluation_mode(backbone):
            features, labels = extract_features(
                lambda images: probe_features(backbone, images, self.num_last_blocks, self.average_patches),
                evaluation_loader(source, inputs.dataset),
                inputs.device,
                inputs.autocast,
                mean=mean,
                std=std,
            )
        assert labels is not None
        return features, labels

    def _probe(
        self,
        features: Tensor,
        labels: Tensor,
        test_features: Tensor,
        test_labels: Tensor,
        num_classes: int,
        seed: int,
        device: torch.device,
    ) -> tuple[float, float, float]:
        """The chosen learning rate, and top-1 and top-5 [%] of a probe trained with it."""
        num_chosen_on = max(1, round(self.choice_fraction * len(features)))
        if num_chosen_on >= len(features):
            raise ValueError(f"the linear probe needs at least 2 training images, not {len(features)}")
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        apart, rest = order[:num_chosen_on], order[num_chosen_on:]
        options: dict[str, Any] = {"epochs": self.epochs, "batch_size": self.batch_size, "seed": seed, "device": device}
        rates = [rate * self.batch_size / 256 for rate in self.learning_rates]
        probes = train_probes(features[rest], labels[rest], num_classes, rates, **options)
        best = int(probes.hits(features[apart], labels[apart]).argmax())
        probe = train_probes(features, labels, num_classes, [rates[best]], **options)
        top1, top5 = (
            100.0 * int(probe.hits(test_features, test_labels, within)) / len(test_labels) for within in (1, 5)
        )
        return self.learning_rates[best], top1, top5


def probe_features(backbone: Backbone, images: Tensor, num_last_blocks: int, average_patches: bool) -> Tensor:
    """`[N, C, H, W]` -> `[N, D']`: class tokens of the last blocks, oldest first, then the mean patch of the last one.

    Of backbones that have no tokens: their features.
    """
    if not backbone.has_tokens:
        features: Tensor = backbone(images)
        return features
    layers = backbone.intermediate_layers(images, min(num_last_blocks, backbone.depth))  # [N, T, D] each
    parts = [layer[:, 0] for layer in layers]
    if average_patches:
        parts.append(layers[-1][:, 1:].mean(dim=1))
    return torch.cat(parts, dim=-1)
