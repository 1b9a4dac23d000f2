"""Seconds of training to a k-NN accuracy on Fashion-MNIST, with the recipe of `experiment=fashion_mnist` for all; CPU.

Network, initial weights, schedules, batch, loss and augmentation are the same. The baseline makes its views by PIL in
as many workers as there are cores, and steps with one thread; ours has the threads that the recipe gives it
(`trainer.num_threads`), or is several ranks of one thread each with a share of the batch. They train in turns, an epoch
each. After every epoch the same function classifies the held-out images by their nearest neighbours; that, and starting
up, is not in the time. Nobody logs or saves.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from benchmarks.harness import NUM_CORES, Contender, Running, Unavailable, num_ranks
from benchmarks.options import Options
from benchmarks.training_steps import OurStep, baseline_training
from benchmarks.views import PILImages, baseline_transform, make_augmentation
from dino import ranks
from dino.config import build, compose
from dino.dataset import ImageDataset, TrainLoader
from dino.evaluation.features import extract_features
from dino.evaluation.knn import knn_classify
from dino.evaluation.splits import evaluation_loader, limited
from dino.schedule import scaled_lr

NEIGHBOURS = 20
PRECISIONS = ("fp32", "bf16")  # of the baseline; the recipe's is what suits the machine
Curve = list[list[float]]  # of seconds of training and k-NN accuracy [%], one for each epoch, from 0 s on
BANK = 20_000  # training images that vote; the held-out images are all classified


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """A table for each seed, and where there are several, one of their mean curves."""
    curves = []
    for seed in options.seeds:
        curves.append(_race(seed, options))
        yield {"name": f"Fashion-MNIST, seed {seed}, on the CPU", **summarise(curves[-1])}
    if len(curves) > 1:
        mean = {name: np.mean([of_seed[name] for of_seed in curves], axis=0).tolist() for name in curves[0]}
        yield {"name": "Fashion-MNIST, mean of these seeds, on the CPU", **summarise(mean)}


def _race(seed: int, options: Options) -> dict[str, Curve]:
    settings = {
        "root": str(options.data.expanduser().absolute()),
        "epochs": options.epochs,
        "steps": None,
        "seed": seed,
    }
    if options.quick:
        settings |= {"epochs": 1, "steps": 2}
    recipe = compose(["experiment=fashion_mnist"])
    threads, several = recipe.trainer.num_threads or NUM_CORES, num_ranks(recipe.dataset.batch_size)
    contenders = [
        *(
            Contender(
                f"baseline {precision}", "benchmarks.time_to_accuracy:Baseline", {**settings, "precision": precision}, 1
            )
            for precision in PRECISIONS
        ),
        Contender("ours, as the recipe", "benchmarks.time_to_accuracy:Ours", settings, threads=threads),
        Contender(f"ours, {several} ranks", "benchmarks.time_to_accuracy:Ours", settings, threads=1, ranks=several),
    ]
    running = {contender.name: Running(contender, "cpu") for contender in contenders}
    try:
        for process in running.values():
            process.wait_until_ready()
        curves = {name: [[0.0, process.ask("answer")[0]["answer"]]] for name, process in running.items()}
        for _ in range(settings["epochs"]):
            for name, process in running.items():
                seconds = process.sample(1, untimed=0)["seconds"][0]
                accuracy = process.ask("answer")[0]["answer"]
                curves[name].append([curves[name][-1][0] + seconds, accuracy])
    finally:
        for process in running.values():
            process.end()
    return curves


def summarise(curves: dict[str, Curve]) -> dict[str, Any]:
    """When each reaches what all reach, and the curves."""
    reached = min(max(accuracy for _, accuracy in curve) for curve in curves.values())
    seconds = {name: seconds_to(reached, curve) for name, curve in curves.items()}
    baselines = [name for name in curves if name.startswith("baseline")]
    rows = [
        [
            name,
            f"{curve[-1][0]:.0f}",
            f"{curve[-1][1]:.1f} %",
            f"{seconds[name]:.0f}",
            *(f"{seconds[baseline] / seconds[name]:.2f}" if seconds[name] else "" for baseline in baselines),
        ]
        for name, curve in curves.items()
    ]
    columns = [
        "",
        "seconds in all",
        "k-NN at the end",
        f"seconds to {reached:.1f} %",
        *(f"times {name}" for name in baselines),
    ]
    return {"columns": columns, "rows": rows, "curves": curves}


def seconds_to(accuracy: float, curve: Curve) -> float:
    """When a curve of (seconds, accuracy) first reaches `accuracy`, on straight lines between its points."""
    if curve[0][1] >= accuracy:
        return curve[0][0]
    for (start, low), (end, high) in itertools.pairwise(curve):
        if high >= accuracy:
            return start + (end - start) * (accuracy - low) / (high - low)
    raise ValueError(f"{accuracy} is never reached")


class Recipe(ABC):
    """Trains an epoch a call; the answer is the k-NN accuracy of the teacher now [%]."""

    def __init__(self, device: torch.device, root: str, epochs: int, steps: int | None, seed: int) -> None:
        world_size = ranks.world_size()
        self.config: DictConfig = compose(
            [
                *("experiment=fashion_mnist", f"dataset.root={root}", f"trainer.epochs={epochs}", f"seed={seed}"),
                f"trainer.limit_steps_per_epoch={'null' if steps is None else steps}",
            ]
        )
        batch = self.config.dataset.batch_size
        self.config.dataset.batch_size = batch // world_size
        self.device, self.epoch = device, 0
        self.dataset: ImageDataset = build(self.config, "dataset")
        try:
            self.dataset.train()
        except ValueError as error:
            raise Unavailable(f"{error}; for benchmarks --data FOLDER") from error
        self.num_evaluated = None if steps is None else 64

    def __call__(self) -> None:
        self.train_epoch(self.epoch)
        self.epoch += 1

    @abstractmethod
    def train_epoch(self, epoch: int) -> None: ...

    @abstractmethod
    def teacher_backbone(self) -> nn.Module: ...

    def answer(self) -> float:
        splits = self.dataset.evaluation()
        assert splits is not None
        mean, std = self.dataset.normalization()
        features = []
        for split, limit in zip(splits, (self.num_evaluated or BANK, self.num_evaluated), strict=True):
            loader = evaluation_loader(limited(split, limit), self.dataset)
            features += extract_features(self.teacher_backbone(), loader, self.device, mean=mean, std=std)
        return knn_classify(*features, 10, [NEIGHBOURS])[NEIGHBOURS].top1


class Ours(Recipe):
    """What `python train.py experiment=fashion_mnist` does between two evaluations."""

    def __init__(self, device: torch.device, root: str, epochs: int, steps: int | None, seed: int) -> None:
        super().__init__(device, root, epochs, steps, seed)
        self.augmentation = make_augmentation(self.config)
        self.loader = TrainLoader(
            self.dataset, self.augmentation, seed=seed, rank=ranks.rank(), world_size=ranks.world_size()
        )
        self.steps_per_epoch = steps or self.loader.num_batches
        self.step = OurStep(self.config, device, self.steps_per_epoch).train_step
        self.number = 0

    def train_epoch(self, epoch: int) -> None:
        for batch in itertools.islice(self.loader.epoch(epoch), self.steps_per_epoch):
            self.step(self.number, [self.augmentation.photometric(batch)])
            self.number += 1

    def teacher_backbone(self) -> nn.Module:
        return self.step.model.teacher.backbone


class Baseline(Recipe):
    """The textbook's step fed by a DataLoader of PIL views, on the schedules of the recipe."""

    def __init__(
        self, device: torch.device, root: str, epochs: int, steps: int | None, seed: int, precision: str
    ) -> None:
        super().__init__(device, root, epochs, steps, seed)
        images = self.dataset.train().images
        assert images is not None
        batch = self.config.dataset.batch_size
        self.loader = torch.utils.data.DataLoader(
            PILImages(images, baseline_transform(self.config)),
            batch,
            shuffle=True,
            drop_last=True,
            num_workers=NUM_CORES,
            persistent_workers=True,
        )
        self.steps_per_epoch = steps or len(self.loader)
        self.training = baseline_training(self.config, precision, device)
        self.backbone = build(self.config, "backbone")
        span = {"epochs": epochs, "steps_per_epoch": self.steps_per_epoch}
        lr = scaled_lr(self.config.optimizer.lr, batch, self.config.trainer.lr_reference_batch)
        names = ("weight_decay", "teacher_momentum", "teacher_temp")
        self.schedules = {name: build(self.config, f"schedule.{name}", **span) for name in names}
        self.schedules["lr"] = build(self.config, "schedule.lr", base=lr, **span)

    def train_epoch(self, epoch: int) -> None:
        frozen = epoch < self.config.trainer.freeze_last_layer_epochs
        for position, views in enumerate(itertools.islice(self.loader, self.steps_per_epoch)):
            step = epoch * self.steps_per_epoch + position
            scheduled = {name: schedule(step) for name, schedule in self.schedules.items()}
            self.training(views, freeze_last_layer=frozen, **scheduled)

    def teacher_backbone(self) -> nn.Module:
        self.backbone.load_state_dict(self.training.teacher.backbone.state_dict())
        return self.backbone
