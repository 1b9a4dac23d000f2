"""The contenders of `make bench` compute the same, and the harness measures what it says."""

import dataclasses
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import REPOSITORY, finish, spawn
from torch import Tensor

from benchmarks import head_loss, layers, loss, machine, profiling, results, step, training_steps, update, views
from benchmarks.cores import round_trip_ns
from benchmarks.harness import Contender, ContenderError, Sampling, compare
from benchmarks.summary import summarise
from benchmarks.training_steps import OurStep, baseline_training, compose_step, list_of_views
from dino.config import compose

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    **{"backbone": "vit_t16", "depth": 2, "out_dim": 96, "batch": 3, "num_local_views": 2},
    **{"global_size": 48, "local_size": 32, "drop_path": 0.0},
}


def test_three_steps_of_the_baseline_are_ours() -> None:
    """Losses, student, teacher and center in float64; gradients are clipped, the prototypes frozen for one step."""
    settings = ["trainer.precision=fp32", "trainer.clip_norm=0.1", "optimizer.lr=0.1", "schedule.lr.warmup_epochs=0"]
    config = compose_step(**TINY, overrides=settings)
    ours, plain = OurStep(config, CPU), baseline_training(config, "fp32", CPU)
    train_step, batch = ours.train_step, ours.views
    for module in (train_step.model, train_step.loss, plain.student, plain.teacher, plain.loss):
        module.double()
    train_step.freeze_last_layer_steps = 1
    assert batch.local_views is not None
    batch = dataclasses.replace(batch, global_views=batch.global_views.double(), local_views=batch.local_views.double())
    before = {name: value.clone() for name, value in plain.student.state_dict().items()}
    for number in range(3):
        expected = plain(list_of_views(batch), **train_step.schedules(number), freeze_last_layer=number == 0)
        assert float(train_step(number, [batch]).loss) == pytest.approx(expected, rel=1e-12)
    for network, of_baseline in ((train_step.model.student, plain.student), (train_step.model.teacher, plain.teacher)):
        torch.testing.assert_close(network.state_dict(), of_baseline.state_dict(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(train_step.loss.centering.center, plain.loss.center, rtol=1e-12, atol=1e-15)
    still = [name for name, value in plain.student.state_dict().items() if torch.equal(value, before[name])]
    assert still == ["head.last_layer.weight_g"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("part", [layers.Linear, layers.Mixing])
def test_layers_answer_what_those_of_torch_do(part: type[layers.Layers], precision: str) -> None:
    size = {"backbone": "vit_t16", "batch": 1, "global_size": 32}
    answers = []
    for ours in (True, False):
        work = part(CPU, size, precision, ours)
        work()
        answers.append(work.answer())
    assert answers[0] == pytest.approx(answers[1], rel=1e-3 if precision == "bf16" else 1e-6)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # of lightly
@pytest.mark.parametrize(("num_local_views", "tolerance"), [(0, 1e-6), (2, 1e-3)])
def test_lightly_with_timm_starts_at_the_same_loss(num_local_views: int, tolerance: float) -> None:
    """Position tables of local views are interpolated in another way there, hence the second tolerance."""
    pytest.importorskip("lightly", reason="the extra `bench` is not installed")
    settings = {**TINY, "num_local_views": num_local_views}
    answers = []
    for work in (
        training_steps.plain(CPU, "fp32", **settings),
        training_steps.lightly(CPU, "fp32", **settings),
        training_steps.lightly(CPU, "bf16", fused_attention=False, **settings),
        training_steps.lightly(CPU, "bf16", **settings),
    ):
        work()
        answers.append(work.answer())
    assert answers[1] == pytest.approx(answers[0], rel=tolerance)
    assert answers[2:] == pytest.approx([answers[0]] * 2, rel=0.01)
    weights = {name: value.clone() for name, value in work.student.state_dict().items()}
    work()
    assert any(not torch.equal(value, weights[name]) for name, value in work.student.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_contenders_of_the_loss_agree(precision: str) -> None:
    out_dim, batch = 200, 3
    works: dict[str, Any] = {"plain": head_loss.plain(CPU, out_dim, batch, precision)}
    for implementation in ("fused", "sliced"):
        works[implementation] = head_loss.ours(CPU, out_dim, batch, precision, implementation)
    given = {"plain": loss.plain(CPU, out_dim, batch), "fused": loss.ours(CPU, out_dim, batch, "fused")}
    if _has_lightly():
        works["lightly"] = head_loss.lightly(CPU, out_dim, batch, precision)
        given["lightly"] = loss.lightly(CPU, out_dim, batch)
    for work in (*works.values(), *given.values()):
        work()
    reference = works["plain"]
    tolerance = {"rtol": 1e-4, "atol": 1e-7} if precision == "fp32" else {"rtol": 0.2, "atol": 2e-4}
    for work in works.values():
        assert work.answer() == pytest.approx(reference.answer(), rel=1e-5 if precision == "fp32" else 5e-3)
        for one, other in ((work.student, reference.student), (work.layer.weight_v, reference.layer.weight_v)):
            assert one.grad is not None
            torch.testing.assert_close(one.grad, other.grad, **tolerance)
    for work in given.values():
        assert work.answer() == pytest.approx(given["plain"].answer(), rel=1e-6)
        torch.testing.assert_close(work.student.grad, given["plain"].student.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("part", update.PARTS)
def test_contenders_of_the_update_agree(part: str) -> None:
    """Every gradient is clipped in every repetition, so that no contender can leave it out."""
    size = {"backbone": "vit_t16", "out_dim": 64, "depth": 1}
    plain, ours = update.PlainUpdate(part, size, CPU), update.OurUpdate(part, size, CPU)
    before = [tensor.clone() for tensor in plain._tensors()]
    for work in (plain, ours):
        for _ in range(3):
            work()
    assert ours.answer() == pytest.approx(plain.answer(), rel=1e-7)
    assert any(not torch.equal(old, new) for old, new in zip(before, plain._tensors(), strict=True))
    if part == "clip":
        assert all(float(gradient.norm()) <= plain.clip_norm * 1.001 for gradient in plain._gradients())


def test_views_of_all_contenders_are_alike(tmp_path: Path) -> None:
    """Shapes, and mean and deviation of all values; who colours on the device is not asked."""
    assert views.write_photos(tmp_path, None, 16) == "made up"
    random.seed(0)
    torch.manual_seed(0)
    contenders = [views.PlainPhotos(CPU, str(tmp_path))]
    if _has_lightly():
        contenders.append(views.LightlyPhotos(CPU, str(tmp_path)))
    figures = []
    for contender in contenders:
        of_images = contender()
        expected = [(3, 224, 224)] * 2 + [(3, 96, 96)] * 6
        assert [tuple(view.shape) for view in of_images[0]] == expected
        figures.append(_mean_and_deviation([view for of_image in of_images for view in of_image]))
    for form in ("exact", "matrix"):
        overrides = ["augmentation.photometric_device=cpu", f"augmentation.jitter_form={form}"]
        batch = views.OurPhotos(CPU, str(tmp_path), overrides)()
        assert batch.global_views.shape == (2, 16, 3, 224, 224)
        assert batch.local_views.shape == (6, 16, 3, 96, 96)
        assert batch.global_views.dtype == torch.uint8
        config = compose(["dataset=folder", f"dataset.root={tmp_path}", "augmentation.num_local_views=6", *overrides])
        floats = views.make_augmentation(config).photometric(batch)
        figures.append(_mean_and_deviation([*floats.global_views.flatten(0, 1), *floats.local_views.flatten(0, 1)]))
    for mean, deviation in figures[1:]:
        assert mean == pytest.approx(figures[0][0], abs=0.3)
        assert deviation == pytest.approx(figures[0][1], rel=0.15)


def test_photographs_of_ones_own(tmp_path: Path) -> None:
    views.write_photos(tmp_path / "mine", None, 3)
    assert views.write_photos(tmp_path / "made", tmp_path / "mine", 5) == "real"
    assert len(list((tmp_path / "made").rglob("*.jpg"))) == 5
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--images .*empty: there are no \.jpg"):
        views.write_photos(tmp_path / "other", tmp_path / "empty", 5)


def test_operations_of_a_step_are_those_of_its_products() -> None:
    """Counted by hand for one block on 2 + 1 views of one image, one head."""
    settings = {**TINY, "depth": 1, "batch": 1, "num_local_views": 1}
    config = compose_step(**settings)
    d, patch, hidden, bottleneck = 192, 16 * 16 * 3, config.head.hidden_dim, config.head.bottleneck_dim

    def forward(num_views: int, size: int) -> int:
        patches = (size // 16) ** 2
        tokens = patches + 1
        attention = 2 * 2 * tokens * tokens * d
        return num_views * (2 * patches * patch * d + 2 * tokens * d * (4 + 8) * d + attention)

    head = 2 * (d * hidden + hidden * hidden + hidden * bottleneck + bottleneck * settings["out_dim"])
    teacher = forward(2, 48) + 2 * head
    student = forward(2, 48) + forward(1, 32) + 3 * head
    first_layer = 2 * (2 * 9 + 4) * patch * d  # no gradient of the images
    assert step.step_flops(settings) == teacher + 3 * student - first_layer


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::_log_softmax", "loss"),
        ("autograd::engine::evaluate_function: LogSoftmaxBackward0", "loss"),
        ("void (anonymous namespace)::cunn_SoftMaxForward<4, float, SoftMaxForwardEpilogue>", "loss"),
        ("aten::exp_", "loss"),
        ("aten::expand", "other"),
        ("aten::_softmax_backward_data", "attention"),
        ("aten::bmm", "attention"),
        ("aten::addmm", "matrix products"),
        ("aten::_fused_adamw_", "optimizer and teacher"),
        ("triton_per_fused__log_softmax_0", "compiled"),
    ],
)
def test_kinds_of_operations(operation: str, kind: str) -> None:
    assert profiling.kind_of(operation) == kind


def test_products_and_softmax_over_prototypes_are_of_the_loss() -> None:
    assert profiling.kind_of("aten::bmm", over_prototypes=True) == "loss"
    assert profiling.kind_of("aten::_softmax", over_prototypes=True) == "loss"
    assert profiling.kind_of("aten::mm", over_prototypes=True) == "matrix products"


def _measured(rounds: list[tuple[float, bool]], threads: int = 2) -> dict[str, Any]:
    samples: list[dict[str, Any]] = [
        {
            "seconds": [seconds],
            "calibration_s": [0.001, 0.001],
            "others": 0.5 if disturbed else 0.0,
            "cores_ns": [130.0, 140.0],
        }
        for seconds, disturbed in rounds
    ]
    memory = {"process": 1.0, "extra": 1.0, "prepared": 1.0}
    return {"threads": threads, "samples": samples, "memory_mib": memory, "answer": None}


def test_disturbed_samples_are_left_out() -> None:
    figures = summarise(
        {
            "baseline": _measured([(2.0, False), (2.2, False), (9.0, True), (2.1, False)]),
            "ours": _measured([(1.0, False), (1.1, False), (1.05, False), (1.05, False)]),
        },
        ("baseline",),
        min_clean=3,
    )
    assert figures["baseline"]["seconds"]["median"] == pytest.approx(2.1)
    assert (figures["baseline"]["num_clean"], figures["baseline"]["num_samples"]) == (3, 4)
    assert figures["ours"]["times_faster"]["baseline"]["median"] == pytest.approx(2.0)  # 9.0 / 1.05 is none
    assert not figures["ours"]["noisy"]


def test_figures_from_too_few_undisturbed_samples_are_marked() -> None:
    figures = summarise({"baseline": _measured([(2.0, True), (3.0, True), (4.0, False)])}, ("baseline",), min_clean=3)
    assert figures["baseline"]["noisy"]
    assert figures["baseline"]["seconds"]["median"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("AMD EPYC 9654 96-Core", "AMD EPYC 9654 96-Core"), ("AMD EPYC", "AMD EPYC (family 25, model 17)")],
)
def test_cpus_that_a_virtual_machine_calls_alike_are_told_apart(name: str, expected: str, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {name}\nstepping\t: 1\n" * 2)
    assert machine.cpu_name(cpuinfo) == expected


def test_a_slower_machine_around_a_sample_disturbs_it() -> None:
    measured = _measured([(2.0, False)] * 4)
    measured["samples"][1]["calibration_s"] = [0.001, 0.0015]
    assert [sample["clean"] for sample in summarise({"ours": measured}, (), 3)["ours"]["samples"]] == [
        *(True, False, True, True)
    ]


def test_ratios_with_the_cores_near_and_far_are_taken_apart() -> None:
    baseline, ours = _measured([(3.0, False)] * 3 + [(2.0, False)] * 5), _measured([(1.0, False)] * 8)
    for of_one in (baseline, ours):
        for sample in of_one["samples"][3:]:
            sample["cores_ns"] = [350.0, 340.0]
    ours["samples"][-1]["cores_ns"] = [350.0, 130.0]  # moved meanwhile
    figures = summarise({"baseline": baseline, "ours": ours}, ("baseline",), min_clean=3)
    times = figures["ours"]["times_faster_by_cores"]["baseline"]
    assert {place: of_place["median"] for place, of_place in times.items()} == {"near": 3.0, "far": 2.0}
    assert "times_faster_by_cores" not in summarise({"ours": _measured([(1.0, False)] * 3)}, ("ours",), 3)["ours"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="needs two cores")
def test_the_way_between_two_cores_is_some_hundred_nanoseconds() -> None:
    assert 10 < round_trip_ns() < 100_000


@pytest.mark.slow
def test_contenders_run_in_processes_of_their_own() -> None:
    size = {"out_dim": 16384, "batch": 64}
    compared = compare(
        "loss",
        [
            Contender("baseline", "benchmarks.loss:plain", size, threads=1),
            Contender("ours", "benchmarks.loss:ours", {**size, "implementation": "fused"}, threads=1),
        ],
        Sampling(rounds=3, seconds=0.01, warmup=1, device="cpu", generations=2),
        memory="extra",
    )
    baseline, ours = compared["contenders"]["baseline"], compared["contenders"]["ours"]
    assert ours["answer"] == pytest.approx(baseline["answer"], rel=1e-6)
    assert ours["num_samples"] == 4, "each generation of processes makes two rounds"
    logits_mib = 640 * 16384 * 4 / 2**20
    assert baseline["memory_mib"]["prepared"] > logits_mib
    assert baseline["memory_mib"]["extra"] > ours["memory_mib"]["extra"] > 0.8 * logits_mib  # one gradient
    with pytest.raises(ContenderError, match=r"(?s)broken: .*has no attribute 'missing'"):
        compare("", [Contender("broken", "benchmarks.loss:missing")], Sampling(device="cpu"))


def run(words: list[str]) -> Any:
    return finish(spawn([sys.executable, str(REPOSITORY / "benchmarks" / "run.py"), *words], cwd=REPOSITORY), 1200)


def test_an_unknown_benchmark_is_refused() -> None:
    done = run(["steps"])
    assert done.returncode == 2
    assert "steps: use step, layers, loss" in done.stderr


def test_a_page_without_results(tmp_path: Path) -> None:
    assert results.write_page(tmp_path / "results").read_text().startswith("# Results")


@pytest.mark.slow
def test_results_of_the_command_line() -> None:
    """Of the benchmark with the fewest processes; all of them run by `make bench BENCH=--quick`, in many minutes."""
    done = run(["update", "--quick", "--device", "cpu"])
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.splitlines()[-1])
    (path,) = page.parent.glob("*/*.json")
    result = json.loads(path.read_text())
    assert path.stem == "update"
    assert "### update" in page.read_text()
    for comparison in result["results"]:
        answers = [figures["answer"] for figures in comparison["contenders"].values()]
        numbers = [answer for answer in answers if isinstance(answer, float)]
        assert all(number == pytest.approx(numbers[0], rel=0.02) for number in numbers)


def _has_lightly() -> bool:
    try:
        import lightly  # noqa: F401
    except ImportError:
        return False
    return True


def _mean_and_deviation(made: list[Tensor]) -> tuple[float, float]:
    values = torch.cat([view.flatten() for view in made])
    return float(values.mean()), float(values.std())
