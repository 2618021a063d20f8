"""When a level has seen enough to step: how its gradients' signal stands to their noise.

Of n gradients of one period the mean has a squared error of noise / n. The gradient noise scale (McCandlish et al.,
arXiv:1812.06162) is the n at which that is as large as the signal, the true gradient's squared norm: fewer gradients
make a step that is mostly noise, more of them make one step of what could have been several. Both are estimated without
bias from products of different gradients,

    signal <- beta signal + (1 - beta) g_n . mean(g_1 ... g_n-1)
    power  <- beta power  + (1 - beta) |g_n|^2                       noise = power - signal

and the signal-to-noise ratio of the mean of n is n signal / noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BETA = 0.9
"""Of the running means: some ten gradients."""
SIGNAL, POWER, UPDATES, STEPS = "level_signal", "level_power", "level_updates", "level_steps"
KEYS = (SIGNAL, POWER, UPDATES, STEPS)
"""What an adaptive level keeps in its parameter groups: two running means, its updates, and the steps up to them."""


def fresh() -> dict[str, Any]:
    """Before the first gradient."""
    return {SIGNAL: 0.0, POWER: 0.0, UPDATES: 0, STEPS: 0}


@torch.no_grad()
def measured(group: Mapping[str, Any], pairs: Sequence[tuple[Tensor, Tensor]], before: int) -> tuple[float, float]:
    """Signal and power after one more gradient.

    Args:
        group: of the level.
        pairs: every parameter's gradient, and the sum of those before it in this period.
        before: how many those are, 1 or more.
    """
    product = sum(((new.double() * total).sum() for new, total in pairs), start=torch.zeros(()))
    power = sum((new.double().square().sum() for new, _ in pairs), start=torch.zeros(()))
    found = [float(product) / before, float(power)]
    mixed = [BETA * group[key] + (1 - BETA) * new for key, new in zip((SIGNAL, POWER), found, strict=True)]
    return mixed[0], mixed[1]


def ratio(signal: float, power: float, gradients: int) -> float:
    """Signal-to-noise ratio of the mean of so many; 0 where no signal shows."""
    noise = power - signal
    if signal <= 0:
        return 0.0
    return math.inf if noise <= 0 else gradients * signal / noise


def check_values(values: Mapping[str, Any]) -> None:
    """Raises ValueError for what no adaptive level can have kept."""
    for key in (SIGNAL, POWER):
        if not isinstance(values.get(key), float) or not math.isfinite(values[key]):
            raise ValueError(f"{key} of a level is {str(values.get(key))[:80]}, and not a finite number")
    for key in (UPDATES, STEPS):
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{key} of a level is {str(value)[:80]}, and not a number, 0 or more")
