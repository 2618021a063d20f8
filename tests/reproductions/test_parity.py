"""Which rate a parity training has, how far it holds, and what is shown of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reproductions.harness.rows import NAME, Rows
from reproductions.parity import run as parity


def training(part: str, rate: float, accuracy: dict[str, float], seed: int = 0) -> dict[str, Any]:
    row = {"part": part, "preset": "hope", "training": "reset", "seed": seed, "steps": 600, "learning_rate": rate}
    return row | {"rows": parity.ROWS, "accuracy": accuracy}


@pytest.mark.parametrize(
    ("accuracy", "longest"),
    [
        ({"40": 1.0, "160": 0.99, "640": 0.98}, 160),
        ({"640": 1.0, "40": 1.0, "160": 0.5}, 40),  # a longer one does not make up for it
        ({"40": 0.6, "160": 1.0}, 0),
        ({"40": 1.0, "2560": 1.0, "10240": 1.0}, 10240),
    ],
)
def test_the_horizon_is_the_last_length_before_the_first_that_fails(accuracy: dict[str, float], longest: int) -> None:
    assert parity.horizon({"accuracy": accuracy}) == longest


def test_every_seed_has_its_horizon_and_choices_are_not_shown() -> None:
    rows = [training("rate", 0.003, {"320": 0.5}, 3), training("rate", 0.01, {"320": 1.0}, 3)]
    rows += [training("test", 0.01, {"40": 1.0, "10240": value}, seed) for seed, value in ((1, 0.5), (0, 1.0))]
    shown = parity.report(rows).parts["results"]
    assert "| `hope` | reset | 0.01 | 1.0000 (1.0000, 1.0000) |" in shown
    assert "| 0.7500 (1.0000, 0.5000) | 10,240, 40 |" in shown and "0.003" not in shown


def test_a_rate_is_chosen_where_nothing_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def trained(key: dict[str, Any], tests: dict[int, int], test_seed: int) -> dict[str, Any]:
        asked.append((key["part"], key["seed"], *tests))
        assert test_seed == (parity.CHOICE_SEED if key["part"] == "rate" else parity.TEST_SEED)
        return {"accuracy": dict.fromkeys(map(str, tests), 1 - key["learning_rate"])}

    monkeypatch.setattr(parity, "trained", trained)
    rows = Rows(tmp_path / NAME)
    assert parity.tuned(rows, "hope", "carry", (0.2, 0.1), 5) == 0.1
    parity.measure(rows, "test", "hope", "carry", 0, 0.1, 5)
    assert asked == [("rate", 3, 320), ("rate", 3, 320), ("test", 0, 40, 160, 640, 2560, 10240)]
    assert parity.TUNE_SEED not in parity.SEEDS and not parity.CHOICE.keys() & parity.TESTS.keys()


@pytest.mark.parametrize("preset", parity.PRESETS)
def test_models_are_those_of_the_presets(preset: str) -> None:
    """No setting beside the size."""
    config = parity.presets.PRESETS[preset](vocab_size=2, hidden_size=32, num_layers=2, num_heads=2)
    assert parity.build(preset).config.blocks == config.blocks
