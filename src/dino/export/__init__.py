"""Weights for the tools that people have; reading them back in is `dino.trained`."""

from dino.export.command import Exported, export
from dino.export.formats import FORMATS

__all__ = ["FORMATS", "Exported", "export"]
