"""Sweeps: planned, frozen and submitted at once; watched, resumed and collected from files, by any process."""

from dino.sweep.plan import Sweep

__all__ = ["Sweep"]
