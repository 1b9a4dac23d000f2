"""The spread of outputs over the prototypes, against slow loops in numpy."""

import json
import math

import numpy as np
import pytest
import torch

from dino.evaluation.distributions import Distributions, concentration_ranks


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def expected_figures(student: np.ndarray, targets: np.ndarray, temp: float) -> dict[str, object]:
    """Of student logits [V, B, K] and teacher probabilities [G, B, K], one output at a time."""
    num_prototypes = student.shape[-1]

    def spread(outputs: list[np.ndarray]) -> dict[str, object]:
        entropies, largest, masses = [], [], []
        for output in outputs:
            entropies.append(-sum(p * math.log(p) for p in output if p > 0))
            descending = sorted(output, reverse=True)
            largest.append(descending[0])
            masses.append([sum(descending[:rank]) for rank in concentration_ranks(num_prototypes)])
        figures = {}
        for name, values, end in (("entropy", entropies, math.log(num_prototypes)), ("max_probability", largest, 1.0)):
            counts = [0] * 40
            for value in values:
                counts[min(int(value / end * 40), 39)] += 1
            figures[name] = {"edges": [end * edge / 40 for edge in range(41)], "counts": counts}
        ranks = concentration_ranks(num_prototypes)
        return figures | {
            "concentration": {
                "rank": ranks,
                "mass": [sum(column) / len(masses) for column in zip(*masses, strict=True)],
            }
        }

    num_global, num_images = len(targets), student.shape[1]
    pairs = [(i, j) for i in range(num_global) for j in range(len(student)) if i != j]
    agree = [len({targets[i, b].argmax() for i in range(num_global)}) == 1 for b in range(num_images)]
    hits = [targets[i, b].argmax() == student[j, b].argmax() for i, j in pairs for b in range(num_images)]
    return {
        "num_prototypes": num_prototypes,
        "teacher": spread([row for view in targets for row in view]),
        "student": spread([softmax(row / temp) for view in student for row in view]),
        "agreement": {"teacher": sum(agree) / len(agree), "student_teacher": sum(hits) / len(hits)},
    }


def approx(value: object) -> object:
    if isinstance(value, dict):
        return {key: approx(item) for key, item in value.items()}
    return pytest.approx(value, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("num_prototypes", "num_views"), [(32, 5), (20, 2)])
def test_the_figures_are_those_of_slow_loops(num_prototypes: int, num_views: int) -> None:
    draw = np.random.default_rng(0)
    student = draw.normal(size=(num_views, 9, num_prototypes)) * 0.3
    student += 2 * np.eye(num_prototypes)[:9]  # so that views agree now and then
    targets = np.array(
        [[softmax(row / 0.5) for row in view] for view in student[:2] + draw.normal(size=(2, 9, num_prototypes))]
    )
    rows = torch.tensor(student.reshape(-1, num_prototypes)), torch.tensor(targets.reshape(-1, num_prototypes))
    found = Distributions.of(*rows, 0.1, 2).figures()
    assert found == approx(expected_figures(student, targets, 0.1))
    assert 0 < found["agreement"]["student_teacher"] < 1
    assert json.loads(json.dumps(found)) == found


def test_batches_join_to_the_whole() -> None:
    torch.manual_seed(0)
    student, targets = torch.randn(3, 10, 16), torch.randn(2, 10, 16).softmax(dim=-1)

    def of(images: slice) -> Distributions:
        return Distributions.of(student[:, images].flatten(0, 1), targets[:, images].flatten(0, 1), 0.1, 2)

    joined = Distributions.joined([of(slice(0, 7)), of(slice(7, 10))]).figures()
    assert joined == approx(of(slice(None)).figures())


def test_collapsed_outputs_lie_at_the_ends() -> None:
    uniform = torch.full((4, 8), 1 / 8)
    found = Distributions.of(50 * torch.eye(8)[:1].expand(4, 8), uniform, 0.1, 2).figures()
    assert found["teacher"]["entropy"]["counts"][-1] == 4
    assert found["teacher"]["concentration"] == {"rank": [1, 2, 4, 8], "mass": pytest.approx([1 / 8, 1 / 4, 1 / 2, 1])}
    assert found["student"]["entropy"]["counts"][0] == 4
    assert found["student"]["max_probability"]["counts"][-1] == 4


def test_outputs_that_are_not_finite_are_left_out_and_null() -> None:
    found = Distributions.of(torch.full((4, 8), torch.nan), torch.full((4, 8), torch.nan), 0.1, 2).figures()
    assert sum(found["teacher"]["entropy"]["counts"]) == 0
    assert found["student"]["concentration"]["mass"] == [None] * 4


@pytest.mark.parametrize(("num_prototypes", "ranks"), [(2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_ranks_double_up_to_all_prototypes(num_prototypes: int, ranks: list[int]) -> None:
    assert concentration_ranks(num_prototypes) == ranks
