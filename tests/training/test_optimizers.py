"""Runs with another optimizer than AdamW."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from nestling.errors import UserError
from nestling.optim import NAMES
from nestling.training import TrainConfig, train
from tests.training.test_train import Interrupted, interrupt_at, without_speed

Make = Callable[..., TrainConfig]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_trains(tiny_config: Make, name: str) -> None:
    config = tiny_config(preset="hope", optimizer=name, gradient_accumulation=2)
    train(config)
    losses = [r["loss"] for r in without_speed(config.out) if "loss" in r]
    assert losses[-1] < losses[0]


ALWAYS_RESUMED = (("m3", ""), ("m3", "cms.1=3"), ("delta_gradient_descent", "cms.1=3"))
"""One whose state says when, the same inside a level's period, and one that keeps what layers have read."""
RESUMED = [
    pytest.param(*case, marks=() if case in ALWAYS_RESUMED else pytest.mark.slow)
    for case in product(("m3", "muon", "delta_gradient_descent", "deep_momentum"), ("", "cms.1=3"))
]


@pytest.mark.parametrize(("name", "levels"), RESUMED)
def test_an_interrupted_run_resumes_exactly(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, levels: str
) -> None:
    whole = tiny_config(preset="hope", optimizer=name, levels=levels, out=str(tmp_path / "whole"), save_every=2)
    train(whole)
    config = tiny_config(preset="hope", optimizer=name, levels=levels, out=str(tmp_path / "broken"), save_every=2)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 5)
        train(config)
    train(config, resume=True)
    assert without_speed(config.out) == without_speed(whole.out)


def test_rates_by_the_size_of_a_step(tiny_config: Make) -> None:
    assert tiny_config(optimizer="m3", learning_rate=None).resolved().learning_rate == 3e-3
    assert tiny_config(optimizer="sgd", learning_rate=None).resolved().learning_rate == 0.1


def test_the_run_keeps_its_optimizer(tiny_config: Make) -> None:
    config = tiny_config(optimizer="delta_momentum", steps=2)
    train(config)
    assert json.loads((Path(config.out) / "train_config.json").read_text())["config"]["optimizer"] == "delta_momentum"
    with pytest.raises(UserError, match="optimizer"):
        tiny_config(optimizer="adam")
