"""Settings of a run: defaults, refusals, and the record that a resumed run is compared with."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nestling.errors import UserError
from nestling.training import TrainConfig
from nestling.training.config import CONFIG_FILE, begun_with, differences, read_run


def test_budget_and_rate_are_resolved() -> None:
    default = TrainConfig(out="r").resolved()
    assert (default.steps, default.warmup_steps, default.learning_rate) == (500, 50, 3e-3)
    by_tokens = TrainConfig(out="r", tokens=10_000, size="340m", gradient_accumulation=2).resolved()
    assert (by_tokens.steps, by_tokens.tokens, by_tokens.learning_rate) == (3, None, 4e-4)  # 3 * 4096 >= 10,000
    assert TrainConfig(out="r", tokens=10_000).resolved(processes=2).steps == 3
    assert by_tokens.resolved() == by_tokens


def test_tokens_of_a_row() -> None:
    """What memories read between two steps, and after what they start anew."""
    make = partial(TrainConfig, out="r", sequence_length=64, batch_size=4, gradient_accumulation=3)
    anew, carried, for_a_while = make(), make(carry_state=True), make(carry_state=True, carry_tokens=128)
    assert [(c.row_tokens_per_step(), c.restart()) for c in (anew, carried, for_a_while)] == [
        (64, 64),
        (192, None),
        (192, 128),
    ]


def test_json_round_trip() -> None:
    config = TrainConfig(out="r", data=("a", "b"), overrides={"periods": [4, None]})
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UserError, match="does not know: colour"):
        TrainConfig.from_dict(config.to_dict() | {"colour": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"steps": 5, "tokens": 5}, "both --steps and --tokens"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, but must be positive"),
        ({"precision": "fp8"}, "precision is fp8, but must be float32 or bf16"),
        ({"matmul_precision": "low"}, "matmul_precision is low, but must be highest, high or medium"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"carry_tokens": 256}, "no effect without --carry-state"),
        ({"carry_tokens": 100, "carry_state": True}, "no multiple of the sequence length 256"),
        ({"streaming": True}, "--streaming needs exactly one --data"),
        ({"log_every": 2.5}, "log_every is 2.5, but must be a whole number, at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, but must be a number, positive"),
        ({"tensorboard": "no"}, "tensorboard is no, but must be true or false"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(out="r", **settings)


def test_differences_name_what_changes_the_run_only() -> None:
    config = TrainConfig(out="r")
    assert differences(config, replace(config, out="s", save_every=7, tensorboard=False)) == []
    assert differences(config, replace(config, seed=1, data=("x",))) == ["data: [] -> ['x']", "seed: 0 -> 1"]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run to resume"):
        read_run(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_run(tmp_path)


def test_the_number_of_processes_a_run_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As recorded; of version 0.1, which did not, by the files of its newest checkpoint."""
    record = {"config": TrainConfig(out="r").to_dict(), "data": {}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(record | {"processes": 4}))
    assert begun_with(tmp_path, None) == 4
    (tmp_path / CONFIG_FILE).write_text(json.dumps(record))
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "rng_state.pth").touch()
    assert begun_with(tmp_path, checkpoint) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert begun_with(tmp_path, None) == 2, "without a checkpoint it begins anew"
    for process in range(3):
        (checkpoint / f"rng_state_{process}.pth").touch()
    assert begun_with(tmp_path, checkpoint) == 3
    (tmp_path / CONFIG_FILE).write_text(json.dumps(record | {"processes": "many"}))
    with pytest.raises(UserError, match="is damaged \\(it names 'many' processes\\)"):
        begun_with(tmp_path, None)
