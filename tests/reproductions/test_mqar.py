"""Which trainings the recall report shows."""

from __future__ import annotations

from typing import Any

import pytest

from reproductions.mqar import run as mqar


def training(rate: float, steps: int, seed: int, accuracy: float, ablation: str | None = None) -> dict[str, Any]:
    row = {"preset": "hope", "ablation": ablation, "rate": rate, "steps": steps, "seed": seed, "diverged": False}
    return row | {"validation": [accuracy] * 3, "test": [accuracy] * 3, "state_bytes": [1024] * 3}


@pytest.mark.parametrize("steps", [100, 300])
def test_rates_are_those_of_the_short_trainings(steps: int) -> None:
    rows = [training(0.003, 100, 0, 0.2), training(0.01, 100, 0, 0.4)]
    if steps == 300:  # at the other rate it would have been better
        rows += [training(0.003, 300, 0, 0.9), training(0.01, 300, 0, 0.5), training(0.01, 300, 1, 0.7)]
        rows += [training(0.01, 300, 0, 0.6, "chunk 1")]
    parts = mqar.report(rows).parts
    assert "0.003" not in parts["results"]
    assert ("0.600 (0.500, 0.700), 1 KiB" if steps == 300 else "0.400 (0.400), 1 KiB") in parts["results"]
    assert ("| chunk 1 | `hope` | 0.01 |" in parts["ablations"]) == (steps == 300)
    # at the ablation's seeds
    assert ("| nothing | `hope` | 0.01 | 0.500 (0.500), 1 KiB" in parts["ablations"]) == (steps == 300)
