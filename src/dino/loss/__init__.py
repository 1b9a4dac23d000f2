"""The objective: cross-entropy between views, centering of the teacher, weighting of its terms, and KoLeo."""

from dino.loss.centering import Centering, EMACentering, SinkhornKnopp
from dino.loss.dino_loss import DINOLoss, LossTerms, num_pairs
from dino.loss.koleo import koleo_loss
from dino.loss.weighting import AdaptiveWeighting, BalancedWeighting, PairsWeighting, Weighting

__all__ = [
    "AdaptiveWeighting",
    "BalancedWeighting",
    "Centering",
    "DINOLoss",
    "EMACentering",
    "LossTerms",
    "PairsWeighting",
    "SinkhornKnopp",
    "Weighting",
    "koleo_loss",
    "num_pairs",
]
