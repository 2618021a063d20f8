from __future__ import annotations

import pytest
import torch

from reproductions.harness.schedule import warm_cosine


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10, 11, 20, 100])
def test_a_training_of_any_length_has_a_rate(steps: int) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule, rates = warm_cosine(optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.04)
    assert all(0 < rate <= 1 for rate in rates)
    if steps > 2:
        assert rates[-1] == pytest.approx(0.1)
    if steps > 1:
        assert max(rates) == pytest.approx(1.0, abs=1e-6)
