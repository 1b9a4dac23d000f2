from dino.training.assemble import assemble
from dino.training.introduction import introduce
from dino.training.options import TrainerOptions
from dino.training.resume import resume_or_start
from dino.training.step import Schedules, TrainStep
from dino.training.summary import leaving_report, summarise_run
from dino.training.trainer import Trainer

__all__ = [
    "Schedules",
    "TrainStep",
    "Trainer",
    "TrainerOptions",
    "assemble",
    "introduce",
    "leaving_report",
    "resume_or_start",
    "summarise_run",
]
