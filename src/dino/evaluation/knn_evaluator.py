"""k-NN on the features of a backbone (original: eval_knn.py), with raw pixels as the mark to beat.

Shapes: N images, C channels, D features.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dino.dataset import Source
from dino.evaluation.classes import class_accuracies
from dino.evaluation.features import extract_features
from dino.evaluation.inputs import FeatureInputs
from dino.evaluation.knn import KNNResult, knn_classify
from dino.evaluation.splits import Once, evaluation_loader, limited, smaller

# Raw pixels take C * size^2 values an image: at 224 px all of ImageNet would be 770 GB.
MAX_PIXEL_VALUES = 2**28  # of one split; 1 GiB in float32


@dataclass(kw_only=True)
class KNNEvaluator:
    """Classifies the held-out split by its nearest neighbours in the training split.

    The first k gives `val/knn_top1` and `val/knn_top5` [%]; each further k appends `_k<k>` to these names. At step 0
    the same keys show the untrained network, and `val/knn_top1_pixels` shows the first k on the raw pixels that the
    network is given: at the evaluation size, normalised (cosine similarity says more about centered values). How each
    class does is written to the run as `knn.json` (`class_accuracies`).

    Args:
        every_epochs: period; read by the trainer.
        prefix: what the names of the metrics begin with.
        neighbours: each k.
        temperature: a neighbour votes with exp(cosine similarity / temperature).
        max_bank: at most so many training images vote; None: all.
        half_precision: features are kept in 16 bits, in half the memory; compared in 32.
        pixel_baseline: whether raw pixels are classified at step 0.

    Raises:
        ValueError: for a number out of its range, naming the key.
    """

    every_epochs: int = 10
    prefix: str = "val"
    neighbours: list[int] = field(default_factory=lambda: [20])
    temperature: float = 0.07
    max_bank: int | None = None
    half_precision: bool = False
    pixel_baseline: bool = True
    _once: Once = field(default_factory=Once, init=False, repr=False)

    def __post_init__(self) -> None:
        name = "evaluation.knn"
        if self.every_epochs < 1:
            raise ValueError(f"{name}.every_epochs={self.every_epochs}: use a whole number of at least 1")
        distinct = len(set(self.neighbours)) == len(self.neighbours)
        if not self.neighbours or min(self.neighbours) < 1 or not distinct:
            raise ValueError(f"{name}.neighbours={self.neighbours}: list different whole numbers of at least 1")
        if not self.temperature > 0:
            raise ValueError(f"{name}.temperature={self.temperature}: use a number above 0, such as 0.07")
        if self.max_bank is not None and self.max_bank < 1:
            raise ValueError(f"{name}.max_bank={self.max_bank}: use a whole number of at least 1, or null")

    def evaluate(self, inputs: FeatureInputs) -> dict[str, float]:
        """Metrics in percent; none, with one line in the log, where labels or a held-out split are missing.

        The backbone runs in evaluation mode and is put back into its own afterwards.
        """
        splits = inputs.dataset.evaluation()
        if splits is None:
            self._once.say(f"no k-NN: dataset {inputs.dataset.name} has no held-out split")
            return {}
        bank, held_out = splits
        if bank.labels is None or held_out.labels is None:
            self._once.say(f"no k-NN: dataset {inputs.dataset.name} has no labels")
            return {}
        bank = limited(bank, smaller(inputs.limit_samples, self.max_bank))
        held_out = limited(held_out, inputs.limit_samples)
        metrics: dict[str, float] = {}
        results, labels, num_classes = self._features(inputs, bank, held_out)
        for position, (k, result) in enumerate(results.items()):
            suffix = f"_k{k}" if position else ""
            metrics |= {f"{self.prefix}/knn_top1{suffix}": result.top1, f"{self.prefix}/knn_top5{suffix}": result.top5}
        first = self.neighbours[0]
        names = inputs.dataset.class_names
        inputs.write("knn", {"k": first} | class_accuracies(labels, results[first].predictions, num_classes, names))
        if inputs.untrained and self.pixel_baseline:
            metrics[f"{self.prefix}/knn_top1_pixels"] = self._pixels(inputs, bank, held_out).top1
        return metrics

    def _features(
        self, inputs: FeatureInputs, bank: Source, held_out: Source
    ) -> tuple[dict[int, KNNResult], Tensor, int]:
        """The result of each k, the held-out labels [N], and the number of classes."""
        mean, std = inputs.dataset.normalization()

        def extract(source: Source) -> tuple[Tensor, Tensor]:
            loader = evaluation_loader(source, inputs.dataset)
            features, labels = extract_features(
                inputs.backbone,
                loader,
                inputs.device,
                inputs.autocast,
                mean=mean,
                std=std,
                half_precision=self.half_precision,
            )
            assert labels is not None
            return features, labels

        known, asked = extract(bank), extract(held_out)
        results = self._classify(inputs, known, asked, self.neighbours)
        return results, asked[1], self._num_classes(inputs, known[1], asked[1])

    def _pixels(self, inputs: FeatureInputs, bank: Source, held_out: Source) -> KNNResult:
        mean, std = inputs.dataset.normalization()
        channels, size = inputs.dataset.channels, inputs.dataset.evaluation_size
        limit = max(1, MAX_PIXEL_VALUES // (channels * size**2))
        if max(len(bank), len(held_out)) > limit:
            self._once.say(f"k-NN on raw pixels: {limit} images of each split, so that they fit into memory")

        def extract(source: Source) -> tuple[Tensor, Tensor]:
            loader = evaluation_loader(limited(source, limit), inputs.dataset)
            cpu = torch.device("cpu")
            pixels, labels = extract_features(lambda images: images.flatten(1), loader, cpu, mean=mean, std=std)
            assert labels is not None
            return pixels, labels

        k = self.neighbours[0]
        return self._classify(inputs, extract(bank), extract(held_out), [k])[k]

    def _classify(
        self,
        inputs: FeatureInputs,
        bank: tuple[Tensor, Tensor],
        held_out: tuple[Tensor, Tensor],
        neighbours: list[int],
    ) -> dict[int, KNNResult]:
        classes = self._num_classes(inputs, bank[1], held_out[1])
        return knn_classify(*bank, *held_out, classes, neighbours, self.temperature, device=inputs.device)

    def _num_classes(self, inputs: FeatureInputs, *labels: Tensor) -> int:
        known = inputs.dataset.num_classes
        return known if known is not None else 1 + max(int(each.max()) for each in labels)
