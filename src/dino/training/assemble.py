"""From a composed config to a trainer: every object of a run is built here, in the order in which data meets it."""

import torch
from omegaconf import DictConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dino import ranks
from dino.backbone.sync_batch_norm import convert_sync_batch_norm
from dino.config import build, result_settings
from dino.dataset import TrainLoader
from dino.loss import DINOLoss
from dino.model import MultiCropModel, StudentTeacher
from dino.optimizer import parameter_groups
from dino.run import Run
from dino.runtime import Precision, choose_device, reuse_freed_memory, set_seeds
from dino.schedule import scaled_lr
from dino.start_up import StartUp
from dino.training.options import RECOMPUTED, TrainerOptions
from dino.training.step import Schedules, TrainStep
from dino.training.trainer import Trainer


def assemble(config: DictConfig, run: Run, start_up: StartUp | None = None) -> Trainer:
    """Builds dataset, views, networks, loss, optimizer and schedules, and the trainer around them.

    Args:
        start_up: of this process, where its time to the first step is to be told.

    Raises:
        ValueError: for what only the data or the machine can tell to be wrong, naming the key.
    """
    start_up = start_up or StartUp()
    options: TrainerOptions = build(config, "trainer")
    precision = prepare_process(options, run.processes.local_rank)
    device = precision.device
    set_seeds(config.seed)  # every rank starts with the same networks

    dataset = build(config, "dataset")
    mean, std = dataset.normalization()
    augmentation = build(config, "augmentation", mean=mean, std=std)
    loader = TrainLoader(
        dataset,
        augmentation,
        seed=config.seed,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        pin_memory=device.type == "cuda",
    )
    steps_per_epoch = epoch_length(loader, options)
    start_up.mark("data")

    train_step = build_step(config, options, precision, steps_per_epoch, loader.batch_size)
    if ranks.rank() > 0:
        set_seeds(config.seed, ranks.rank())  # and draws drop path of its own
    facts = {"world_size": ranks.world_size(), "num_training_images": len(dataset.train())}
    start_up.mark("networks")
    return Trainer(
        options=options,
        train_step=train_step,
        dataset=dataset,
        loader=loader,
        augmentation=augmentation,
        monitor=build(config, "monitor"),
        evaluators=[build(config, f"evaluation.{name}") for name in config.evaluation],
        loggers=[build(config, f"logger.{name}") for name in config.logger if ranks.rank() == 0],
        run=run,
        seed=config.seed,
        settings=result_settings(config) | facts,
        steps_per_epoch=steps_per_epoch,
        start_up=start_up,
    )


def prepare_process(options: TrainerOptions, local_rank: int = 0) -> Precision:
    """Settles what holds for the whole process, threads, allocator, convolutions, and returns device and precision.

    Raises:
        ValueError: for a device or a precision that this machine lacks.
    """
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    precision = Precision.choose(options.precision, choose_device(options.device, local_rank))
    if precision.device.type == "cpu":
        reuse_freed_memory(options.memory != "low")
    else:
        torch.backends.cudnn.allow_tf32 = precision.name == "tf32"
    return precision


def epoch_length(loader: TrainLoader, options: TrainerOptions) -> int:
    """Optimizer steps per epoch; a last window that is not full is left out, as a last batch is.

    Raises:
        ValueError: if not even one step fits into the data.
    """
    steps = loader.num_batches // options.accumulate_steps
    if steps < 1:
        raise ValueError(
            f"trainer.accumulate_steps={options.accumulate_steps}: an epoch has only {loader.num_batches} batches of "
            f"dataset.batch_size={loader.batch_size}, so no step would be made; use at most {loader.num_batches}"
        )
    return min(steps, options.limit_steps_per_epoch or steps)


def build_step(
    config: DictConfig, options: TrainerOptions, precision: Precision, steps_per_epoch: int, batch_size: int
) -> TrainStep:
    """Networks, loss, optimizer and schedules, on their device."""
    backbone = build(config, "backbone")
    model = StudentTeacher(MultiCropModel(backbone, build(config, "head", in_dim=backbone.embed_dim)))
    model.check_wiring()
    shards = None
    if options.parallel == "fsdp" and ranks.world_size() > 1:
        from dino.training.sharding import divide  # late: FSDP takes half a second to import

        shards = divide(model, precision)
    student = over_ranks(model.to(precision.device), precision.device) if shards is None else model.student
    model.student.backbone.recompute = RECOMPUTED[options.memory]
    if options.compile:
        # Student, teacher and evaluation, the first, the last and the other blocks are code of their own.
        torch._dynamo.config.recompile_limit = 64
        model.student.backbone.compile_parts()
        model.teacher.backbone.compile_parts()
    loss: DINOLoss = build(config, "loss").to(precision.device)
    if options.memory != "fast":
        loss.save_memory()
    images_per_step = batch_size * options.accumulate_steps * ranks.world_size()
    span = {"epochs": options.epochs, "steps_per_epoch": steps_per_epoch}
    reference = options.lr_reference_batch
    lr = config.optimizer.lr if reference is None else scaled_lr(config.optimizer.lr, images_per_step, reference)
    optimizer = build(config, "optimizer")(parameter_groups(shards.student if shards else model.student))
    if shards is not None:
        shards.attach(optimizer)
    return TrainStep(
        model=model,
        loss=loss,
        optimizer=optimizer,
        ema=build(config, "ema"),
        schedules=Schedules(
            lr=build(config, "schedule.lr", base=lr, **span),
            weight_decay=build(config, "schedule.weight_decay", **span),
            teacher_momentum=build(config, "schedule.teacher_momentum", **span),
            teacher_temp=build(config, "schedule.teacher_temp", **span),
        ),
        precision=precision,
        clip_mode=options.clip_mode,
        clip_norm=options.clip_norm,
        freeze_last_layer_steps=options.freeze_last_layer_epochs * steps_per_epoch,
        freeze_backbone_steps=options.freeze_backbone_steps,
        total_steps=options.epochs * steps_per_epoch,
        student=student,
        shards=shards,
    )


def over_ranks(model: StudentTeacher, device: torch.device) -> nn.Module:
    """The student as the forward pass takes it: averaging gradients over the ranks, where there are several.

    Batch norm is synchronised in student and teacher alike, as in the original (main_dino.py, train_dino).
    """
    if ranks.world_size() == 1:
        return model.student
    for network in (model.student, model.teacher):
        convert_sync_batch_norm(network, device)
    return DistributedDataParallel(
        model.student,
        device_ids=[device] if device.type == "cuda" else None,
        # No tensor is unused; but with this the buckets of the gradients stay as they were made. They would be made
        # anew after the first step, also after that of a resumed run, and sums over ranks would be rounded differently.
        find_unused_parameters=True,
    )
