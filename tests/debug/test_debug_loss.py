"""`dino debug loss`: of fresh networks and of runs; it is content with what is healthy and names what is not."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dino.cli import app
from dino.config import compose, save_config
from dino.debug import LossInspection, Subject, inspect_loss, subject_of, subject_of_path
from dino.debug.checks import Check
from dino.loss import DINOLoss
from dino.training.checkpoint import CheckpointStore

SMALL = ["dataset.batch_size=8", "head.out_dim=32", "head.hidden_dim=16", "head.bottleneck_dim=8"]


def run(*words: str, cwd: Path) -> tuple[int, str, str]:
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, ["debug", "loss", *words, "--output", str(cwd / "loss.png")])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def subject() -> Subject:
    torch.set_num_threads(1)
    return subject_of(compose([*SMALL, "head.bottleneck_dim=64", "backbone.drop_path_rate=0.2"]))


def wrong(inspection: LossInspection) -> dict[str, str]:
    """Name and detail of every check that fails."""
    return {check.name: check.detail for check in inspection.checks if check.holds is False}


def check_of(inspection: LossInspection, words: str) -> Check:
    (found,) = [check for check in inspection.checks if words in check.name]
    return found


# ---------------------------------------------------------------------- fresh networks


@pytest.mark.parametrize(
    "extra",
    [[], ["augmentation.num_local_views=0"], ["loss.weighting=balanced"], ["loss.koleo_weight=0"]],
    ids=["default", "global", "balanced", "pairs"],
)
def test_every_intermediate_is_shown_and_the_loss_agrees_with_the_reference(extra: list[str], tmp_path: Path) -> None:
    exit_code, stdout, _ = run(*SMALL, *extra, cwd=tmp_path)
    assert exit_code == 0, stdout
    shown = ("global_views", "student_views[0]", "teacher_probabilities[1]", "pair_losses[0,1]", "center_after")
    terms = ("cross-entropy, global views", "kl_teacher_student", "loss_uniform")
    groups = ("backbone.patch_embed", "backbone.blocks.1", "head.mlp", "head.last_layer")
    starts = {line.split("  ")[0] for line in stdout.splitlines()}
    assert {*shown, *terms, *groups} <= starts
    assert "WRONG" not in stdout
    assert "global term equals the step-by-step one" in stdout
    assert "the teacher equals the student at step 0" in stdout
    assert "no gradient reaches the teacher" in stdout


def test_the_distributions_are_drawn(tmp_path: Path) -> None:
    _, stdout, _ = run(*SMALL, cwd=tmp_path)
    assert str(tmp_path / "loss.png") in stdout
    with Image.open(tmp_path / "loss.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    for rows in (slice(0, height // 2), slice(height // 2, height)):
        for columns in (slice(0, width // 2), slice(width // 2, width)):
            panel = pixels[rows, columns]
            assert (panel[..., 2] - panel[..., 0] > 60).any()  # the teacher's blue
            assert (panel[..., 0] - panel[..., 2] > 60).any()  # the student's red


def test_what_it_cannot_check_it_says(tmp_path: Path) -> None:
    exit_code, stdout, _ = run(*SMALL, "loss/centering=sinkhorn", cwd=tmp_path)
    assert exit_code == 0
    assert "not checked the loss equals the step-by-step one" in stdout


def test_statistics_and_terms_are_those_of_slow_numpy(subject: Subject) -> None:
    """Student and teacher once more, in loops over pairs and images."""
    subject.model.eval()  # no drop path, so that a second pass gives the same
    with torch.no_grad():
        projection, features = subject.model.student_forward(subject.views.global_views, subject.views.local_views)
        student = projection.logits()
        teacher = subject.model.teacher_forward(subject.views.global_views).logits()
    found = inspect_loss(subject)

    def softmax(rows: np.ndarray) -> np.ndarray:
        powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    p = softmax(teacher.double().numpy() / subject.teacher_temp).reshape(2, 8, 32)  # the center is 0 at the start
    q = softmax(student.double().numpy() / 0.1).reshape(6, 8, 32)
    pairs = [(i, j) for i in range(2) for j in range(6) if i != j]
    cross = {(i, j): np.mean([-(p[i, b] * np.log(q[j, b])).sum() for b in range(8)]) for i, j in pairs}
    kl = np.mean([(p[i, b] * np.log(p[i, b] / q[j, b])).sum() for i, j in pairs for b in range(8)])
    mean = p.reshape(16, 32).mean(axis=0)
    expected = {
        "loss_uniform": math.log(32),
        "cross_entropy": np.mean(list(cross.values())),
        "kl_teacher_student": kl,
        "entropy_teacher": np.mean([-(row * np.log(row)).sum() for row in p.reshape(16, 32)]),
        "entropy_student": np.mean([-(row * np.log(row)).sum() for row in q.reshape(48, 32)]),
        "entropy_batch_mean": -(mean * np.log(mean)).sum(),
        "num_prototypes_used": len(set(p.reshape(16, 32).argmax(axis=1))),
        "confidence_teacher": p.max(axis=-1).mean(),
        "student_teacher_agreement": np.mean([p[i].argmax(-1) == q[j].argmax(-1) for i, j in pairs]),
    }
    assert {name: found.statistics[name] for name in expected} == pytest.approx(expected, rel=1e-4)

    unit = (features / features.norm(dim=1, keepdim=True)).double().numpy().reshape(6, 8, 64)[:2]
    distances = [
        [min(np.linalg.norm(view[a] - view[b]) for b in range(8) if b != a) for a in range(8)] for view in unit
    ]
    values = [
        cross[0, 1] / 2 + cross[1, 0] / 2,
        np.mean([cross[i, j] for i, j in pairs if j >= 2]),
        -np.log(distances).mean(),
    ]
    assert [term.value for term in found.terms] == pytest.approx(values, rel=1e-4)
    assert [term.weight for term in found.terms] == pytest.approx([2 / 10, 8 / 10, 0.2])
    assert found.total == pytest.approx(0.2 * values[0] + 0.8 * values[1] + 0.2 * values[2], rel=1e-4)
    gradients = {name: p.grad for name, p in subject.model.student.named_parameters() if p.grad is not None}
    for group, norm in found.gradient_norms.items():
        own = [gradient for name, gradient in gradients.items() if f"{name}.".startswith(f"{group}.")]
        assert norm == pytest.approx(math.sqrt(sum((gradient.double() ** 2).sum().item() for gradient in own))), group


# ---------------------------------------------------------------------- what is wrong is named


def test_a_wrong_loss_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = DINOLoss._cross_entropies

    def wrong_by_a_hundredth(*arguments: Any) -> tuple[Any, Any]:
        losses, teacher_sum = right(*arguments)
        return 1.01 * losses, teacher_sum

    monkeypatch.setattr(DINOLoss, "_cross_entropies", wrong_by_a_hundredth)
    exit_code, stdout, _ = run(*SMALL, cwd=tmp_path)
    assert exit_code == 1
    assert "WRONG       global term equals the step-by-step one" in stdout


def test_gradients_that_do_not_arrive_are_noticed(subject: Subject) -> None:
    subject.model.student.head.mlp[0].weight.register_hook(torch.zeros_like)
    assert "none at head.mlp.0.weight" in wrong(inspect_loss(subject))["gradients reach the whole student"]


def test_a_uniform_teacher_is_named(tmp_path: Path) -> None:
    words = ["head.bottleneck_dim=64", "loss.teacher_temp=1", "loss.warmup_teacher_temp=1"]
    exit_code, stdout, _ = run(*SMALL, *words, cwd=tmp_path)
    assert exit_code == 1
    (line,) = [line for line in stdout.splitlines() if line.startswith("WRONG")]
    assert "the teacher's outputs are not uniform (uniform outputs: entropy" in line
    assert "% of ln K = 3.466, at a temperature of 1, which a lower loss.teacher_temp sharpens)" in line


def silence_last_layer(subject: Subject) -> None:
    for network in (subject.model.student, subject.model.teacher):
        network.head.last_layer.weight_g.zero_()


def bend(subject: Subject) -> None:
    subject.model.teacher.head.mlp[0].weight += 0.01


def share_memory(subject: Subject) -> None:
    subject.model.teacher.backbone = subject.model.student.backbone


def drop(subject: Subject) -> None:
    subject.model.teacher.backbone.blocks[0].drop_path.drop_prob = 0.5


def train_teacher(subject: Subject) -> None:
    subject.model.teacher.backbone.norm.weight.requires_grad_()


@pytest.mark.parametrize(
    ("damage", "name", "detail"),
    [
        (
            silence_last_layer,
            "the teacher's outputs are not uniform",
            "uniform outputs: entropy 3.466 is 100.0 % of ln K",
        ),
        (silence_last_layer, "the student's outputs are not uniform", "uniform outputs"),
        (bend, "the teacher equals the student at step 0", "teacher.head.mlp.0.weight does not start equal"),
        (share_memory, "the teacher shares no memory with the student", "lies in the memory of student.backbone"),
        (drop, "the teacher drops nothing at random", "backbone.blocks.0.drop_path"),
        (train_teacher, "no gradient reaches the teacher", "backbone.norm.weight"),
    ],
)
def test_wrong_wiring_and_uniform_outputs_are_named(
    subject: Subject, damage: Callable[[Subject], None], name: str, detail: str
) -> None:
    with torch.no_grad():
        damage(subject)
    assert detail in wrong(inspect_loss(subject))[name]


def test_outputs_that_are_the_same_for_every_image_are_named_after_the_first_epoch(subject: Subject) -> None:
    with torch.no_grad():
        for network in (subject.model.student, subject.model.teacher):
            network.head.mlp[0].weight.zero_()
            network.head.mlp[0].bias.normal_()
    later = dataclasses.replace(subject, step=subject.steps_per_epoch)
    assert check_of(inspect_loss(subject), "tells images apart").holds is None
    found = inspect_loss(later)
    assert wrong(found)["the teacher tells images apart"].startswith(
        "constant outputs: every image gets the same output"
    )
    assert "equals the student" not in str(found.checks)  # only at step 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("network", ["student", "teacher"])
def test_numbers_that_are_not_finite_are_named_in_the_order_of_the_computation(
    subject: Subject, network: str, value: float
) -> None:
    with torch.no_grad():
        getattr(subject.model, network).head.mlp[2].bias[3] = value
    found = inspect_loss(subject)
    detail = wrong(found)["every number is finite"]
    assert detail.startswith(f"not finite: {network}.head.mlp.2.bias, ")
    assert detail.split(" and ")[1].endswith(" more")
    assert not found.sound


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps."""
    folder = tmp_path_factory.mktemp("finished")
    result = command_line.train("run_dir=run", "trainer.save_every_epochs=1", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_looked_at_in_its_newest_checkpoint_and_left_alone(finished: Path, tmp_path: Path) -> None:
    before = contents(finished)
    exit_code, stdout, _ = run(str(finished), "trainer.device=cpu", cwd=tmp_path)
    assert exit_code in (0, 1)  # 12 steps may not tell images apart yet
    assert f"{finished}/checkpoints/step_00000012.pt; step 12, teacher temperature 0.02" in stdout.splitlines()[0]
    assert {line.split(" (")[0] for line in stdout.splitlines() if line.startswith("WRONG")} <= {
        "WRONG       the teacher tells images apart"
    }
    assert "the teacher equals the student" not in stdout
    assert contents(finished) == before


def test_networks_center_and_batch_are_those_of_the_next_step(finished: Path) -> None:
    """A checkpoint of the middle, found when the newest one is damaged, as while it is being written."""
    state: dict[str, Any] = torch.load(finished / "checkpoints" / "step_00000006.pt", weights_only=True)
    newest = finished / "checkpoints" / "step_00000012.pt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:100])
    try:
        subject = subject_of_path(finished, [])
    finally:
        newest.write_bytes(whole)
    assert (subject.step, subject.steps_per_epoch) == (6, 6)
    assert not command_line.differences(dict(subject.model.state_dict()), dict(state["model"]))
    assert not command_line.differences(dict(subject.loss.state_dict()), dict(state["loss"]))
    other = subject_of_path(finished / "config.yaml", [])
    assert len(subject.views.indices) == 64
    assert not torch.equal(subject.views.indices, other.views.indices)  # of epoch 1, and of epoch 0
    center = next(row for row in inspect_loss(subject).rows if row.name == "center_before")
    assert center.high == pytest.approx(state["loss"]["centering.center"].max().item())


def test_a_config_alone_and_a_run_without_a_checkpoint_are_freshly_initialised(tmp_path: Path) -> None:
    (tmp_path / "young").mkdir()
    save_config(compose(SMALL), tmp_path / "young")
    for path, origin in (("young/config.yaml", ""), ("young", " (no checkpoint yet)")):
        exit_code, stdout, _ = run(str(tmp_path / path), cwd=tmp_path)
        assert exit_code == 0
        assert stdout.startswith(f"{tmp_path / path}{origin}, freshly initialised; step 0, ")
    store = CheckpointStore(tmp_path / "young" / "checkpoints", keep=1)
    subject = subject_of(compose(SMALL))
    silenced = subject.model.state_dict()
    silenced["teacher.head.last_layer.weight_g"].zero_()
    state = {"model": silenced, "loss": subject.loss.state_dict(), "step": 500, "steps_per_epoch": 179}
    store.save(500, state, {})
    store.wait()
    exit_code, stdout, _ = run(str(tmp_path / "young"), cwd=tmp_path)
    assert exit_code == 1
    assert "WRONG       the teacher's outputs are not uniform (uniform outputs" in stdout


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["nowhere"], "nowhere: there is no such run directory or file; give a run directory"),
        (["."], "holds no config.yaml"),
        (["young", "seed=3"], "seed=3: changes results; of a run set only what does not"),
        (["young", "trainer.devise=cpu"], "trainer.devise"),
        (["other.yaml"], "other.yaml: this is not the config.yaml of a run"),
        (["loss.teacher_tmp=1"], "did you mean loss.teacher_temp?"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(
    words: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "young").mkdir()
    save_config(compose(SMALL), tmp_path / "young")
    (tmp_path / "other.yaml").write_text("seed: 0\n")
    exit_code, stdout, stderr = run(*words, cwd=tmp_path)
    assert (exit_code, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    assert problem in line
