from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nestling.training import TrainConfig

TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 1}


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a run of seconds: a model of a few thousand parameters on 4 rows of 32 tokens."""

    def make(**changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "out": str(tmp_path / "run"),
            "preset": "transformer",
            "overrides": TINY,
            "sequence_length": 32,
            "batch_size": 4,
            "steps": 8,
            "log_every": 1,
            "eval_every": 4,
            "save_every": 3,
            "eval_tokens": 300,
            "sample_tokens": 5,
            "tensorboard": False,
            "device": "cpu",
        }
        return TrainConfig(**settings | changes)

    return make
