"""What the teacher makes of a few images, as pictures: its attention, the nearest neighbours, the distributions.

Shapes: N images, B images in a batch, C channels, S x S pixels, P patch size, D features, G global views, V all views,
K prototypes.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino import preemption, ranks
from dino.augmentation import preview
from dino.backbone.base import check_at_least
from dino.contact_sheet import magnified, pictures_of, write_sheet
from dino.dataset import Source, SubsetSource, UnreadableImage, spread_indices
from dino.dataset.evaluation_loader import resize_and_cut
from dino.evaluation.attention import class_attention
from dino.evaluation.distributions import Distributions
from dino.evaluation.features import evaluation_mode, extract_features, normalized
from dino.evaluation.held_out_views import held_out_views, in_batches
from dino.evaluation.inputs import EvaluationInputs
from dino.evaluation.knn import nearest_neighbours
from dino.evaluation.splits import Once, evaluation_loader, held_out_or_training, limited, smaller
from dino.heat import heat
from dino.run import write_json

NUM_SEARCHED: Final = 1000  # images among which neighbours are looked for
NUM_NEIGHBOURS: Final = 5
NUM_DISTRIBUTIONS: Final = 256  # images
CELL: Final = 112  # side of an image in a picture [pixels]; what is smaller is magnified by a whole number


@dataclass(kw_only=True)
class PicturesEvaluator:
    """Draws, of the same few held-out images every time, and of the teacher in evaluation mode:

    - `pictures/views.png`: their views, once;
    - `pictures/step_<step>/attention.png`: the last block's attention of the class token to the patches, mean and each
      head, for backbones that have it (`last_attention`);
    - `pictures/step_<step>/neighbours.png`: their nearest neighbours (cosine similarity of features) among at most 1000
      held-out images;
    - `pictures/step_<step>/distributions.json`: the outputs of student and teacher on the views of at most 256
      held-out images, see `Distributions.figures`.

    Labels are not looked at. It gives no metrics, draws no random numbers and leaves the run as it was; a file that
    cannot be written is left out, with one warning. Under several ranks rank 0 draws.

    Args:
        every_epochs: period; read by the trainer.
        num_images: how many images, spread over the held-out split; over the training images where none are held out.

    Raises:
        ValueError: for a number out of its range, naming the key.
    """

    every_epochs: int = 10
    num_images: int = 4
    _once: Once = field(default_factory=Once, init=False, repr=False)

    def __post_init__(self) -> None:
        check_at_least("evaluation.pictures", 1, every_epochs=self.every_epochs, num_images=self.num_images)

    def evaluate(self, inputs: EvaluationInputs) -> dict[str, float]:
        """Nothing but files.

        Raises:
            ValueError: no image can be read.
            Preempted: a signal came to this rank or another.
        """
        source = limited(held_out_or_training(inputs.dataset), smaller(NUM_SEARCHED, inputs.limit_samples))
        features, readable = _features(inputs, source)
        chosen = spread_indices(len(features), self.num_images)
        neighbours = _neighbours(features, chosen, inputs.device)
        distributions = self._distributions(inputs)
        if ranks.rank() == 0:
            try:
                self._write(inputs, source, readable[chosen], readable[neighbours], distributions)
            except (OSError, UnreadableImage) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                self._once.say(f"pictures of the evaluation are left out: {reason}", logging.WARNING)
        return {}

    def _distributions(self, inputs: EvaluationInputs) -> Distributions | None:
        """None where no image can be read; the same on every rank."""
        source = held_out_or_training(inputs.dataset)
        indices = spread_indices(len(source), smaller(NUM_DISTRIBUTIONS, inputs.limit_samples))
        batches = in_batches(indices, inputs.dataset.batch_size)
        batches = batches[ranks.own_part(len(batches))]
        loss, own = inputs.loss, list[Distributions]()
        # Some ranks may have a batch less, so inside none may wait for the others.
        with torch.inference_mode(), evaluation_mode(inputs.model), ranks.alone():
            for views in preemption.until_requested(held_out_views(inputs, source, batches, self._once)):
                with inputs.autocast():
                    teacher_logits = inputs.model.teacher_forward(views.global_views).logits()
                    student_logits = inputs.model.student_forward(views.global_views, views.local_views)[0].logits()
                targets = loss.centering.targets(teacher_logits, inputs.teacher_temp)
                own.append(Distributions.of(student_logits, targets, loss.student_temp, len(views.global_views)))
        preemption.check()
        parts = [part for parts in ranks.gather_objects(own) for part in parts]
        return Distributions.joined(parts) if parts else None

    def _write(
        self,
        inputs: EvaluationInputs,
        source: Source,
        chosen: NDArray[np.int64],
        neighbours: NDArray[np.int64],
        distributions: Distributions | None,
    ) -> None:
        """`chosen` [n] and `neighbours` [n, k] are indices of images in `source`, which can be read."""
        folder = inputs.directory / "pictures"
        mean, std = inputs.dataset.normalization()
        if inputs.untrained or not (folder / "views.png").exists():
            for views in held_out_views(inputs, source, [chosen], self._once):
                preview(views, folder / "views.png", mean, std)
        folder /= f"step_{inputs.step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        if distributions is not None:
            write_json(folder / "distributions.json", distributions.figures())
        images = _images(inputs, source, chosen)
        columns = [("image", _cells(images))]
        for k in range(neighbours.shape[1]):
            columns.append((f"nearest {k + 1}", _cells(_images(inputs, source, neighbours[:, k]))))
        write_sheet(columns, folder / "neighbours.png", small=True)
        write_attention(inputs, images, folder / "attention.png")


def _features(inputs: EvaluationInputs, source: Source) -> tuple[Tensor, NDArray[np.int64]]:
    """The teacher's features [N, D] of all images that can be read, and which images these are [N]."""
    numbered = SubsetSource(source, np.arange(len(source)))
    numbered.labels = np.arange(len(source))  # so that a row of features knows its image
    mean, std = inputs.dataset.normalization()
    loader = evaluation_loader(numbered, inputs.dataset)
    backbone = inputs.backbone
    features, numbers = extract_features(backbone, loader, inputs.device, inputs.autocast, mean=mean, std=std)
    assert numbers is not None
    return features, numbers.numpy()


def _neighbours(features: Tensor, chosen: NDArray[np.int64], device: torch.device) -> NDArray[np.int64]:
    """[n, k] rows of the features [N, D] nearest to each of the `chosen` [n], which is not its own neighbour."""
    k = min(NUM_NEIGHBOURS, len(features) - 1)
    queries = torch.from_numpy(chosen)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        _, rows = nearest_neighbours(features, features[queries], k + 1, device=device)
    others = rows.cpu() != queries[:, None]
    others[others.all(dim=1), -1] = False  # features that are all equal: the own row may not be among the first
    return rows.cpu()[others].reshape(len(chosen), k).numpy()


def _images(inputs: EvaluationInputs, source: Source, indices: NDArray[np.int64]) -> Tensor:
    """uint8 [n, C, S, S], as evaluation sees them."""
    resize, size = inputs.dataset.evaluation_resize, inputs.dataset.evaluation_size
    return torch.cat([resize_and_cut(source.read(index).unsqueeze(0), resize, size) for index in indices.tolist()])


def _cells(images: Tensor) -> list[Image.Image]:
    """uint8 [n, C, S, S] to pictures of at most `CELL` pixels a side."""
    pictures, size = pictures_of(images), images.shape[-1]
    if size > CELL:
        return [picture.resize((CELL, CELL), Image.Resampling.LANCZOS) for picture in pictures]
    return [magnified(picture, CELL // size) for picture in pictures]


def write_attention(inputs: EvaluationInputs, images: Tensor, path: Path) -> None:
    """The attention of the class token to the patches of uint8 images [n, C, S, S]: mean of all heads, then each head.

    Every map is as bright as its largest value allows. Nothing where the backbone has no such attention.
    """
    backbone = inputs.backbone
    if not backbone.has_tokens:
        return
    views = normalized(images.to(inputs.device), *inputs.dataset.normalization())
    with torch.inference_mode(), evaluation_mode(backbone), inputs.autocast():
        weights = class_attention(backbone, views).float().cpu()  # [n, heads, S / P, S / P]
    maps = torch.cat([weights.mean(dim=1, keepdim=True), weights], dim=1)
    cells = _cells(images)
    names = ["mean", *(f"head {head}" for head in range(weights.shape[1]))]
    columns = [(name, [heat(of_image, cells[0].size) for of_image in maps[:, k]]) for k, name in enumerate(names)]
    write_sheet([("image", cells), *columns], path, small=True)
