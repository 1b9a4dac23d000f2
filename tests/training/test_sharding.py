"""Networks divided among ranks: equal to whole ones on every rank, in steps, checkpoints and whole runs."""

import copy
import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import command, differences, finish, last_state, metrics, run, start_ranks
from torch import Tensor
from training.test_step import OPTIMIZERS, make_step, random_views, split

from dino import ranks
from dino.optimizer import parameter_groups
from dino.runtime import Precision
from dino.training.assemble import over_ranks
from dino.training.sharding import divide
from dino.training.step import TrainStep

RunRanks = Callable[..., list[Any]]

# Sums of float64 in another order; Adam divides by what may be nearly nothing, and so makes them larger.
ROUNDING = {"rtol": 1e-7, "atol": 1e-9}
NUM_STEPS = 5
BROKEN_STEP = 3


def sharded_step(**options: Any) -> TrainStep:
    step = make_step(**options)
    shards = divide(step.model, step.precision)
    optimizer = OPTIMIZERS[options.get("optimizer", "adamw")](parameter_groups(shards.student))
    shards.attach(optimizer)
    return dataclasses.replace(step, student=None, shards=shards, optimizer=optimizer)


def replicated_step(**options: Any) -> TrainStep:
    step = make_step(**options)
    step.student = over_ranks(step.model, step.precision.device)
    return step


def state_of(step: TrainStep) -> dict[str, Any]:
    """Of rank 0, on every rank."""
    parts = {"model": step.model, "loss": step.loss, "optimizer": step.optimizer}
    return ranks.from_main(copy.deepcopy({name: part.state_dict() for name, part in parts.items()}))


def load(step: TrainStep, state: dict[str, Any]) -> None:
    step.model.load_state_dict(state["model"])
    step.loss.load_state_dict(state["loss"])
    step.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


def train(step: TrainStep, first: int = 0, last: int = NUM_STEPS) -> list[dict[str, Any]]:
    """Steps of two micro-batches; at one of them a rank gets images that are not finite."""
    outputs = []
    for number in range(first, last):
        window = [split(part, 2)[ranks.rank()] for part in split(random_views(16, seed=number), 2)]
        if number == BROKEN_STEP and ranks.rank() == 1:
            window[0].global_views.fill_(torch.inf)
        output = step(number, window, observe=number % 2 == 0)
        outputs.append(
            {
                "norms": dict(zip(output.grad_names, output.grad_norms, strict=True)),
                "norm": output.grad_norm,
                "skipped": bool(output.skipped),
                "observed": None if output.outputs is None else list(vars(output.outputs).values()),
                "gradients": {
                    name: parameter.grad.clone()
                    for name, parameter in step.student_with_gradients().named_parameters()
                    if parameter.grad is not None
                },
            }
        )
    return outputs


@pytest.mark.parametrize(
    "options",
    [
        {"clip_mode": "per_tensor", "koleo_weight": 0.1},
        {"clip_mode": "global_norm", "head_norm": True},
        pytest.param({"optimizer": "sgd"}, marks=pytest.mark.slow),
    ],
)
def test_divided_networks_take_the_steps_of_whole_ones(run_ranks: RunRanks, options: dict[str, Any]) -> None:
    """Gradients, norms, student, teacher, center and moments; with a frozen last layer and a broken step."""

    def compare() -> list[bool]:
        whole, divided = replicated_step(**options), sharded_step(**options)
        expected, actual = train(whole), train(divided)
        broken = [output.pop("skipped") for output in actual]
        assert broken == [output.pop("skipped") for output in expected]
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **ROUNDING, equal_nan=True)
        torch.testing.assert_close(state_of(divided), state_of(whole), **ROUNDING)
        return broken

    for broken in run_ranks(compare, 2):
        assert broken == [number == BROKEN_STEP for number in range(NUM_STEPS)]


def test_each_rank_holds_a_part_and_checkpoints_hold_everything(run_ranks: RunRanks) -> None:
    def look() -> dict[str, Any]:
        whole, divided = replicated_step(), sharded_step()
        train(divided, last=1)
        assert divided.shards is not None
        moments = [state["exp_avg"] for state in divided.optimizer.state.values()]
        sizes = [
            sum(p.numel() for p in module.parameters()) for module in (whole.model.student, divided.shards.student)
        ]
        state = {name: value.shape for name, value in divided.model.state_dict().items()}
        return {
            "whole": sizes[0],
            "part": sizes[1],
            "teacher": sum(p.numel() for p in divided.shards.teacher.parameters()),
            "moments": sum(m.numel() for m in moments),
            "state": state if ranks.rank() == 0 else None,
            "expected": {name: value.shape for name, value in whole.model.state_dict().items()},
            "kinds": {type(value) for value in divided.model.state_dict().values()},
        }

    first, second = run_ranks(look, 2)
    assert first["state"] == first["expected"]
    assert first["kinds"] == {Tensor}
    assert first["part"] + second["part"] == first["whole"]
    for found in (first, second):
        assert 0.4 * found["whole"] < found["part"] < 0.6 * found["whole"]
        assert found["teacher"] == found["part"]
        assert found["moments"] < 0.6 * found["whole"]


@pytest.mark.parametrize("begins", ["whole", "divided"])
def test_a_run_goes_on_divided_or_whole_whatever_it_was(run_ranks: RunRanks, begins: str) -> None:
    makers = {"whole": replicated_step, "divided": sharded_step}
    then = "divided" if begins == "whole" else "whole"

    def continue_otherwise() -> None:
        undisturbed, first, second = replicated_step(), makers[begins](), makers[then]()
        train(undisturbed)
        train(first, last=2)
        load(second, state_of(first))
        train(second, first=2)
        torch.testing.assert_close(state_of(second), state_of(undisturbed), **ROUNDING)

    run_ranks(continue_otherwise, 2)


def test_a_divided_run_goes_on_exactly(run_ranks: RunRanks) -> None:
    def resume() -> None:
        undisturbed, first, second = sharded_step(), sharded_step(), sharded_step()
        train(undisturbed)
        train(first, last=2)
        load(second, state_of(first))
        train(second, first=2)
        torch.testing.assert_close(state_of(second), state_of(undisturbed), rtol=0, atol=0)

    run_ranks(resume, 2)


def test_a_whole_copy_is_that_of_the_parts_now(run_ranks: RunRanks) -> None:
    def look() -> None:
        step = sharded_step()
        for last in (1, 2):
            train(step, first=last - 1, last=last)
            copied = step.whole_model()
            torch.testing.assert_close(
                ranks.from_main(dict(copied.state_dict())), state_of(step)["model"], rtol=0, atol=0
            )
            views = random_views(2, seed=ranks.rank())  # other images on each rank, and not equally often
            for _ in range(1 + ranks.rank()):
                copied.teacher_forward(views.global_views)
                copied.student_forward(views.global_views, views.local_views)

    run_ranks(look, 2)


def test_a_checkpoint_of_other_networks_is_refused(run_ranks: RunRanks) -> None:
    def refuse() -> None:
        step = sharded_step()
        state = state_of(step)["model"]
        name = "student.head.last_layer.weight_v"
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            step.model.load_state_dict(state | {name: state[name][1:]})
        del state[name]
        with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"{name}\""):
            step.model.load_state_dict(state)

    run_ranks(refuse, 2)


def test_fp16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.parallel=fsdp: not in fp16"):
        divide(make_step().model, Precision("fp16", torch.device("cpu")))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trainer.compile=true"], "trainer.parallel=fsdp: not with trainer.compile=true"),
        (["trainer.precision=fp16"], "trainer.parallel=fsdp: not with trainer.precision=fp16"),
        (["optimizer=lars"], "trainer.parallel=fsdp: optimizer=lars needs norms of whole weights"),
        (["trainer.parallel=dp"], "trainer.parallel=dp: use ddp or fsdp"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    done = run([*command(), "trainer.parallel=fsdp", *words], cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert sentence in line


# ---------------------------------------------------------------------- whole runs

MOVED = ("step", "model", "loss", "optimizer", "rng", "epoch_loss", "loader", "early_stopping")


def run_of_two(run_dir: Path, *words: str) -> list[subprocess.CompletedProcess[str]]:
    processes = start_ranks(2, f"run_dir={run_dir}", "loss.koleo_weight=0", *words, cwd=run_dir.parent)
    results = [finish(process) for process in processes]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    return results


@pytest.mark.slow
def test_runs_of_divided_networks(tmp_path: Path) -> None:
    """Evaluations and all: as whole ones within rounding; stopped in an epoch and resumed, bit for bit."""
    divided = ["trainer.parallel=fsdp", "trainer.memory=low"]
    run_of_two(tmp_path / "whole")
    results = run_of_two(tmp_path / "divided", *divided, "trainer.save_every_steps=4", "trainer.keep_checkpoints=9")
    assert results[1].stdout == ""
    run_of_two(tmp_path / "parts", *divided, f"resume={tmp_path / 'divided' / 'checkpoints' / 'step_00000004.pt'}")
    resumed, undisturbed = (last_state(tmp_path / name) for name in ("parts", "divided"))
    assert differences(*({part: state[part] for part in MOVED} for state in (resumed, undisturbed))) == []
    ours, theirs = (last_state(tmp_path / name)["model"] for name in ("divided", "whole"))
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        if not name.endswith("qkv.bias"):  # of the keys it has no effect, so rounding is all of its gradient
            torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-4, msg=name)
    for ours, theirs in zip(*(metrics(tmp_path / name) for name in ("divided", "whole")), strict=True):
        for name in {"train/loss", "train/grad_norm", "val/loss", "val/effective_rank"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
