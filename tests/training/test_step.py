"""What one optimizer step promises: accumulation equals the large batch, a bad loss changes nothing."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dino import ranks
from dino.augmentation import ViewBatch
from dino.backbone import Recompute, VisionTransformer
from dino.loss import Centering, DINOLoss, EMACentering, SinkhornKnopp
from dino.loss.dino_loss import Implementation
from dino.model import DINOHead, MultiCropModel, StudentTeacher
from dino.optimizer import EMA, LARS, ClipMode, parameter_groups
from dino.runtime import Precision
from dino.schedule import Constant, Cosine
from dino.training.assemble import over_ranks
from dino.training.step import Schedules, TrainStep


def make_step(
    clip_mode: ClipMode = "per_tensor",
    *,
    optimizer: str = "adamw",
    head_norm: bool = False,
    centering: Centering | None = None,
    koleo_weight: float = 0.0,
    implementation: Implementation = "auto",
    recompute: Recompute = "nothing",
) -> TrainStep:
    torch.manual_seed(0)
    span = {"epochs": 2, "steps_per_epoch": 5}
    backbone = VisionTransformer(
        image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, channels=1, drop_path_rate=0.0
    )
    head = DINOHead(in_dim=16, out_dim=24, hidden_dim=24, bottleneck_dim=8, batch_norm=head_norm)
    model = StudentTeacher(MultiCropModel(backbone, head))
    model.double()
    model.student.backbone.recompute = recompute
    loss = DINOLoss(
        centering or EMACentering(out_dim=24), 0.1, koleo_weight=koleo_weight, implementation=implementation
    )
    return TrainStep(
        model=model,
        loss=loss.double(),
        optimizer=OPTIMIZERS[optimizer](parameter_groups(model.student)),
        ema=EMA(),
        schedules=Schedules(
            lr=Cosine(base=0.01, final=1e-4, **span),
            weight_decay=Constant(base=0.1, **span),
            teacher_momentum=Cosine(base=0.9, final=1.0, **span),
            teacher_temp=Constant(base=0.05, **span),
        ),
        precision=Precision("fp32", torch.device("cpu")),
        clip_mode=clip_mode,
        clip_norm=0.3,
        freeze_last_layer_steps=1,
        total_steps=10,
    )


def random_views(batch: int, seed: int) -> ViewBatch:
    generator = torch.Generator().manual_seed(seed)

    def make(count: int, size: int) -> Tensor:
        return torch.randn(count, batch, 1, size, size, generator=generator, dtype=torch.float64)

    return ViewBatch(
        global_views=make(2, 16),
        local_views=make(3, 8),
        indices=torch.arange(batch),
        labels=None,
        parameters=None,
        bad=(),
    )


def split(views: ViewBatch, parts: int) -> list[ViewBatch]:
    assert views.local_views is not None
    chunks = zip(
        views.global_views.chunk(parts, dim=1),
        views.local_views.chunk(parts, dim=1),
        views.indices.chunk(parts),
        strict=True,
    )
    return [
        ViewBatch(global_views=g, local_views=v, indices=i, labels=None, parameters=None, bad=()) for g, v, i in chunks
    ]


@pytest.mark.parametrize("clip_mode", ["per_tensor", "global_norm"])
def test_accumulation_of_4_x_16_equals_1_x_64(clip_mode: ClipMode) -> None:
    """Student, teacher, center and optimizer moments after 4 steps, in float64."""
    large, small = make_step(clip_mode), make_step(clip_mode)
    for step in range(4):
        views = random_views(64, seed=step)
        large(step, [views])
        small(step, split(views, 4))
    for name, expected in large.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], expected, rtol=1e-9, atol=1e-11, msg=name)
    torch.testing.assert_close(small.loss.centering.center, large.loss.centering.center, rtol=1e-10, atol=1e-13)
    assert small.loss.centering.center.abs().max() > 0


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1.0, fused=True),
    "adamw that makes the host wait": lambda groups: torch.optim.AdamW(groups, lr=1.0),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9),
    "lars": lambda groups: LARS(groups, lr=1.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_non_finite_loss_changes_nothing(name: str) -> None:
    """Not with one bad micro-batch of two either; and the next step goes on as if the bad one had not been."""
    step, reference = make_step(optimizer=name), make_step(optimizer=name)
    good, bad = random_views(4, seed=1), random_views(4, seed=2)
    bad.global_views[0, 0, 0, 0, 0] = torch.inf
    for made in (step, reference):
        assert not made(1, [random_views(4, seed=0)]).skipped
    before = copy.deepcopy(changed_by_steps(step))
    output = step(2, [good, bad])
    assert output.skipped
    assert output.broken
    torch.testing.assert_close(changed_by_steps(step), before, rtol=0, atol=0)
    for made in (step, reference):
        assert not made(3, [good]).skipped
    torch.testing.assert_close(changed_by_steps(step), changed_by_steps(reference), rtol=0, atol=0)


def test_a_bad_batch_does_not_reach_the_statistics_of_batch_norm() -> None:
    step = make_step(head_norm=True)
    step(1, [random_views(4, seed=0)])
    before = copy.deepcopy(changed_by_steps(step))
    assert any("running_mean" in name for name in before[0])
    bad = random_views(4, seed=2)
    bad.global_views.fill_(torch.nan)
    assert step(2, [bad]).skipped
    torch.testing.assert_close(changed_by_steps(step), before, rtol=0, atol=0)


def changed_by_steps(step: TrainStep) -> list[Any]:
    return [step.model.state_dict(), step.loss.state_dict(), step.optimizer.state_dict()["state"]]


def test_the_teacher_gets_no_gradients_and_the_student_does() -> None:
    step = make_step()
    step(1, [random_views(4, seed=0)])
    assert all(parameter.grad is None for parameter in step.model.teacher.parameters())
    missing = [n for n, p in step.model.student.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_the_last_layer_is_frozen_for_the_first_steps_only() -> None:
    step = make_step()
    prototypes = step.model.student.head.last_layer.weight_v
    start = prototypes.detach().clone()
    step(0, [random_views(4, seed=0)])
    assert torch.equal(prototypes, start)
    step(1, [random_views(4, seed=1)])
    assert not torch.equal(prototypes, start)


def test_tf32_is_for_the_networks_alone() -> None:
    """The switch is that of the process, so it also runs where there is no GPU."""
    step = make_step()
    step.precision = Precision("tf32", torch.device("cpu"))
    seen = {}

    def note(where: str) -> Callable[..., None]:
        return lambda *_: seen.update({where: torch.get_float32_matmul_precision()})

    step.model.teacher.backbone.register_forward_hook(note("teacher"))
    step.model.student.backbone.register_forward_hook(note("student"))
    next(step.model.student.backbone.parameters()).register_hook(note("backward"))
    step.loss.register_forward_hook(note("loss"))
    step(0, [random_views(4, seed=0)])
    note("after")()
    assert seen == {"teacher": "high", "student": "high", "loss": "highest", "backward": "high", "after": "highest"}


@pytest.mark.parametrize(
    "options",
    [
        {"implementation": "fused"},
        {"implementation": "sliced", "recompute": "part"},
        {"implementation": "sliced", "recompute": "all", "head_norm": True, "optimizer": "sgd"},
    ],
)
def test_ten_fast_steps_are_ten_plain_ones(options: dict[str, Any]) -> None:
    """Losses, student, teacher and center in float64, with all views in one pass or one size after the other."""

    def train(step: TrainStep, apart: bool) -> list[Tensor]:
        if apart:
            one_pass = type(step.model.student.backbone).forward

            def forward(backbone: VisionTransformer, *batches: Tensor) -> Tensor:
                return torch.cat([one_pass(backbone, images) for images in batches])

            for network in (step.model.student, step.model.teacher):
                network.backbone.forward = partial(forward, network.backbone)  # type: ignore[method-assign]
        losses = [step(number, [random_views(8, seed=number)]).loss for number in range(10)]
        return [*losses, *step.model.state_dict().values(), *step.loss.state_dict().values()]

    plain = {name: value for name, value in options.items() if name not in ("implementation", "recompute")}
    found = train(make_step(**options), apart=False)
    for ours, theirs in zip(found, train(make_step(**plain, implementation="plain"), apart=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


CASES: dict[str, dict[str, Any]] = {
    "centering": {},
    "centering and KoLeo": {"koleo_weight": 0.5},
    "Sinkhorn-Knopp": {"centering": SinkhornKnopp()},
    # Biases before a batch norm have no gradient but rounding, which AdamW would magnify.
    "batch norm in the head": {"head_norm": True, "optimizer": "sgd"},
    "two micro-batches each": {"micro_batches": 2},
    "little memory": {"implementation": "sliced", "recompute": "all", "micro_batches": 2},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_with_a_part_of_the_batch_each_equal_one_process(
    run_ranks: Callable[..., list[Any]], case: str, num_ranks: int
) -> None:
    """Losses, student, teacher and center over 10 steps of 32 images, in float64."""
    options = dict(CASES[case])
    micro_batches = options.pop("micro_batches", 1)

    def train() -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
        step = make_step(**copy.deepcopy(options))
        step.student = over_ranks(step.model, torch.device("cpu"))
        losses = []
        for number in range(10):
            # Micro-batch m of all ranks together is the m-th part of the batch.
            window = [
                split(part, ranks.world_size())[ranks.rank()]
                for part in split(random_views(32, seed=number), micro_batches)
            ]
            losses.append(sum(ranks.gather_objects(step(number, window).loss.item())) / ranks.world_size())
        return losses, dict(step.model.state_dict()), dict(step.loss.state_dict())

    expected = train()
    for result in run_ranks(train, num_ranks):
        for ours, theirs in zip(result, expected, strict=True):
            # Neither have biases of the keys: hence atol.
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_a_bad_batch_of_one_rank_changes_nothing_on_any(run_ranks: Callable[..., list[Any]]) -> None:
    def train() -> tuple[bool, bool]:
        step = make_step()
        step.student = over_ranks(step.model, torch.device("cpu"))
        step(1, [random_views(4, seed=ranks.rank())])
        before = copy.deepcopy(changed_by_steps(step))
        bad = random_views(4, seed=2)
        if ranks.rank() == 1:
            bad.global_views.fill_(torch.inf)
        output = step(2, [bad])
        torch.testing.assert_close(changed_by_steps(step), before, rtol=0, atol=0)
        return bool(output.skipped), bool(output.broken)

    assert run_ranks(train, 2) == [(True, True), (True, True)]
