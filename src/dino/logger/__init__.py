from dino.logger.base import Logger, RunContext
from dino.logger.console import Console
from dino.logger.json_lines import JSONLinesLogger
from dino.logger.tracker import TensorBoardLogger, WandbLogger

__all__ = ["Console", "JSONLinesLogger", "Logger", "RunContext", "TensorBoardLogger", "WandbLogger"]
