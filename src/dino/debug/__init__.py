"""One batch through student, teacher and loss, with everything in the open: `dino debug loss`."""

from dino.debug.figure import write_figure
from dino.debug.inspection import LossInspection, inspect_loss
from dino.debug.subject import Subject, is_path, subject_of, subject_of_path
from dino.debug.text import lines_of

__all__ = [
    "LossInspection",
    "Subject",
    "inspect_loss",
    "is_path",
    "lines_of",
    "subject_of",
    "subject_of_path",
    "write_figure",
]
