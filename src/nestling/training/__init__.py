"""Training: the settings of a run, the run, and the trainer it uses."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nestling.training.config import TrainConfig

if TYPE_CHECKING:
    from nestling.training.divergence import DivergenceError
    from nestling.training.run import TrainResult, train
    from nestling.training.trainer import NestlingTrainer

__all__ = ["DivergenceError", "NestlingTrainer", "TrainConfig", "TrainResult", "train"]

_HOMES = {"DivergenceError": "divergence", "NestlingTrainer": "trainer", "TrainResult": "run", "train": "run"}


def __getattr__(name: str) -> Any:
    """What only a run needs is loaded when it is asked for: every command line declares the settings at its start, and
    the Trainer of transformers takes seconds to import."""
    if name in _HOMES:
        return getattr(import_module(f"nestling.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
