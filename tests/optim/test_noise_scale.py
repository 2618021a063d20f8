"""Levels that step when their gradients agree."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from nestling.optim import MultiFrequency, OptimizerLevel
from nestling.optim.noise_scale import BETA, check_values, fresh, ratio


def gradients(signal: float, noise: float, count: int, size: int = 400, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(size, generator=generator, dtype=torch.float64)
    return signal * true + noise * torch.randn(count, size, generator=generator, dtype=torch.float64)


def run(
    given: torch.Tensor, threshold: float, longest: int = 64, parts: int = 2
) -> tuple[list[int], list[torch.Tensor], MultiFrequency]:
    """Steps at which the level was updated, its values there, and the optimizer."""
    parameters = [nn.Parameter(torch.zeros(given.shape[1] // parts, dtype=torch.float64)) for _ in range(parts)]
    level = OptimizerLevel(parameters, longest, partial(torch.optim.SGD, lr=1.0), threshold)
    optimizer = MultiFrequency({"all": level}, reduce="mean")
    updated, values = [], [torch.cat([p.detach() for p in parameters])]
    for number, gradient in enumerate(given):
        for p, part in zip(parameters, gradient.chunk(parts), strict=True):
            p.grad = part.clone()
        due = optimizer.due()
        assert due == optimizer.due()
        optimizer.step()
        now = torch.cat([p.detach() for p in parameters])
        assert due == (["all"] if not torch.equal(now, values[-1]) else [])
        if due:
            updated.append(number)
            values.append(now)
    return updated, values, optimizer


def test_it_steps_as_defined() -> None:
    given = gradients(1.0, 2.0, 60)
    updated, values, _ = run(given, 1.5, longest=7)
    signal = power = 0.0
    begin, wanted = 0, []
    for number, gradient in enumerate(given):
        before = number - begin
        if before:
            signal = BETA * signal + (1 - BETA) * float(gradient @ given[begin:number].mean(0))
            power = BETA * power + (1 - BETA) * float(gradient @ gradient)
            clear = signal > 0 and (before + 1) * signal / (power - signal) >= 1.5
            if clear or before + 1 == 7:
                wanted.append((number, given[begin : number + 1].mean(0)))
                begin = number + 1
    assert updated == [number for number, _ in wanted]
    for (_, mean), old, new in zip(wanted, values, values[1:], strict=False):
        torch.testing.assert_close(old - new, mean)


@pytest.mark.parametrize("noise, scale", [(1.0, 1.0), (3.0, 9.0), (5.0, 25.0)])
def test_the_period_found_is_the_noise_scale(noise: float, scale: float) -> None:
    _, _, optimizer = run(gradients(1.0, noise, 4000), 1.0)
    assert optimizer.levels[0].mean_period == pytest.approx(max(2.0, scale), rel=0.35)
    _, _, twice = run(gradients(1.0, noise, 4000), 2.0)
    assert twice.levels[0].mean_period == pytest.approx(max(2.0, 2 * scale), rel=0.35)


def test_noise_alone_waits_the_longest() -> None:
    updated, _, optimizer = run(gradients(0.0, 1.0, 640), 1.0, longest=16)
    assert optimizer.levels[0].mean_period > 12 and len(updated) <= 53


def test_a_fixed_period_is_what_it_was() -> None:
    new = MultiFrequency({"a": OptimizerLevel([nn.Parameter(torch.ones(1))], 2, None, 1.0)})
    assert math.isnan(new.levels[0].mean_period)
    fixed = MultiFrequency({"a": OptimizerLevel([nn.Parameter(torch.ones(1))], 4)})
    assert fixed.levels[0].mean_period == 4 and "level_signal" not in fixed.param_groups[0]


@pytest.mark.parametrize("stop", [1, 5, 12])
def test_it_goes_on_exactly(stop: int) -> None:
    given = gradients(1.0, 2.0, 40)
    whole, values, _ = run(given, 1.0, longest=9)
    parameter = nn.Parameter(torch.zeros(given.shape[1], dtype=torch.float64))

    def made() -> MultiFrequency:
        return MultiFrequency(
            {"all": OptimizerLevel([parameter], 9, partial(torch.optim.SGD, lr=1.0), 1.0)}, reduce="mean"
        )

    optimizer, updated = made(), []
    for number, gradient in enumerate(given):
        if number == stop:
            saved = optimizer.state_dict()
            optimizer = made()
            optimizer.load_state_dict(saved)
        parameter.grad = gradient.clone()
        updated += [number] if optimizer.due() else []
        optimizer.step()
    assert updated == whole
    torch.testing.assert_close(parameter.detach(), values[-1])


def test_what_cannot_be_is_refused() -> None:
    p = nn.Parameter(torch.ones(1))
    for period, wanted in ((1, 1.0), (4, 0.0), (4, math.inf), (4, -1.0)):
        with pytest.raises(ValueError, match="longest wait"):
            MultiFrequency({"a": OptimizerLevel([p], period, None, wanted)})
    for wrong in ({"level_signal": "a"}, {"level_power": math.nan}, {"level_updates": -1}, {"level_steps": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            check_values(fresh() | wrong)
    assert ratio(-1.0, 1.0, 4) == 0 and ratio(1.0, 1.0, 4) == math.inf and ratio(1.0, 5.0, 4) == 1
