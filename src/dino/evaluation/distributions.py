"""How teacher and student spread their probability over the prototypes, image by image: for pictures.

Shapes: B images in a batch, G global views, L local views, V = G + L, K prototypes, R ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino.loss.precision import at_least_float32

NUM_BINS: Final = 40


@dataclass(frozen=True)
class Spread:
    """One network's outputs over B images and their views, one row each."""

    entropy: NDArray[np.float64]  # [rows], nats
    max_probability: NDArray[np.float64]  # [rows]
    mass: NDArray[np.float64]  # [rows, R], together in the 1, 2, 4, ... K largest probabilities

    @classmethod
    def of(cls, probabilities: Tensor) -> "Spread":
        """Of probabilities [B, K], at least in float32."""
        entropy = torch.special.entr(probabilities).sum(dim=-1)
        cumulated = probabilities.sort(dim=-1, descending=True).values.cumsum(dim=-1)  # [B, K]
        mass = cumulated[:, torch.tensor(concentration_ranks(probabilities.shape[-1])) - 1]
        return cls(*(value.double().cpu().numpy() for value in (entropy, cumulated[:, 0], mass)))

    @classmethod
    def joined(cls, parts: Sequence["Spread"]) -> "Spread":
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("entropy", "max_probability", "mass")
            )
        )

    def figures(self, num_prototypes: int) -> dict[str, Any]:
        """Histograms and mean concentration, as plain values; what is not finite is in no histogram, and null."""
        ranks = concentration_ranks(num_prototypes)
        mass = [float(value) if math.isfinite(value) else None for value in self.mass.mean(axis=0)]
        return {
            "entropy": _histogram(self.entropy, math.log(num_prototypes)),
            "max_probability": _histogram(self.max_probability, 1.0),
            "concentration": {"rank": ranks, "mass": mass},
        }


@dataclass(frozen=True)
class Distributions:
    """The outputs of both networks over some images."""

    num_prototypes: int
    teacher: Spread  # of G * B outputs
    student: Spread  # of V * B outputs
    teacher_agreement: NDArray[np.float64]  # [B], 1 where all teacher views have the same most likely prototype
    student_teacher_agreement: NDArray[np.float64]  # [B], share of the pairs with the same most likely prototype

    @classmethod
    @torch.no_grad()
    def of(cls, student_logits: Tensor, targets: Tensor, student_temp: float, num_global_views: int) -> "Distributions":
        """Of one batch: student logits [V*B, K] and the teacher's probabilities [G*B, K].

        Pairs are those of the loss: teacher view i with every student view j other than i.
        """
        teacher_views = at_least_float32(targets).chunk(num_global_views)  # G x [B, K]
        num_views = len(student_logits) // len(teacher_views[0])
        teacher_top = [view.argmax(dim=-1) for view in teacher_views]
        student, pairs = list[Spread](), list[Tensor]()
        for j, view in enumerate(
            student_logits.chunk(num_views)
        ):  # one at a time, as [V*B, K] sorted takes much memory
            probabilities = torch.softmax(at_least_float32(view) / student_temp, dim=-1)
            student.append(Spread.of(probabilities))
            top = probabilities.argmax(dim=-1)
            pairs += [teacher_top[i] == top for i in range(num_global_views) if i != j]
        agree = torch.stack([top == teacher_top[0] for top in teacher_top]).all(dim=0)
        return cls(
            num_prototypes=student_logits.shape[-1],
            teacher=Spread.joined([Spread.of(view) for view in teacher_views]),
            student=Spread.joined(student),
            teacher_agreement=agree.double().cpu().numpy(),
            student_teacher_agreement=torch.stack(pairs).double().mean(dim=0).cpu().numpy(),
        )

    @classmethod
    def joined(cls, parts: Sequence["Distributions"]) -> "Distributions":
        """Those of several batches as one."""
        return cls(
            num_prototypes=parts[0].num_prototypes,
            teacher=Spread.joined([part.teacher for part in parts]),
            student=Spread.joined([part.student for part in parts]),
            teacher_agreement=np.concatenate([part.teacher_agreement for part in parts]),
            student_teacher_agreement=np.concatenate([part.student_teacher_agreement for part in parts]),
        )

    def figures(self) -> dict[str, Any]:
        """Plain values: for each network histograms of entropy [nats] and largest probability, and the mean mass of the
        1, 2, 4, ... K largest probabilities; and how often views agree on the most likely prototype."""
        return {
            "num_prototypes": self.num_prototypes,
            "teacher": self.teacher.figures(self.num_prototypes),
            "student": self.student.figures(self.num_prototypes),
            "agreement": {
                "teacher": float(self.teacher_agreement.mean()),
                "student_teacher": float(self.student_teacher_agreement.mean()),
            },
        }


def concentration_ranks(num_prototypes: int) -> list[int]:
    """1, 2, 4, ... and K itself."""
    powers = [2**power for power in range(num_prototypes.bit_length())]
    return powers if powers[-1] == num_prototypes else [*powers, num_prototypes]


def _histogram(values: NDArray[np.float64], highest: float) -> dict[str, list[float] | list[int]]:
    """Counts over [0, highest]; rounding beyond the ends is put back."""
    finite = values[np.isfinite(values)].clip(0, highest)
    counts, edges = np.histogram(finite, bins=NUM_BINS, range=(0, highest))
    return {"edges": edges.tolist(), "counts": counts.tolist()}
