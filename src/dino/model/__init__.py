"""The networks of the method: projection head, multi-crop model, student and teacher."""

from dino.model.head import DINOHead, WeightNormLinear
from dino.model.projection import Projection
from dino.model.student_teacher import MultiCropModel, StudentTeacher
from dino.model.wiring import (
    SharedStorageError,
    StudentFrozenError,
    TeacherDiffersError,
    TeacherDropPathError,
    TeacherOptimizedError,
    TeacherTrainableError,
    WiringError,
)

__all__ = [
    "DINOHead",
    "MultiCropModel",
    "Projection",
    "SharedStorageError",
    "StudentFrozenError",
    "StudentTeacher",
    "TeacherDiffersError",
    "TeacherDropPathError",
    "TeacherOptimizedError",
    "TeacherTrainableError",
    "WeightNormLinear",
    "WiringError",
]
