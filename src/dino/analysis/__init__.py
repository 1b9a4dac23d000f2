"""What the files of a run say: its history, what to make of it, pictures and a page."""

from dino.analysis.analyzer import Analysis, analyse
from dino.analysis.history import Event, History, Series
from dino.analysis.report import write_report

__all__ = ["Analysis", "Event", "History", "Series", "analyse", "write_report"]
