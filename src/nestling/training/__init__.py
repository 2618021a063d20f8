"""Training: the settings of a run, the run, and the trainer it uses."""

from __future__ import annotations

from nestling.training.config import TrainConfig
from nestling.training.divergence import DivergenceError
from nestling.training.run import TrainResult, train
from nestling.training.trainer import NestlingTrainer

__all__ = ["DivergenceError", "NestlingTrainer", "TrainConfig", "TrainResult", "train"]
