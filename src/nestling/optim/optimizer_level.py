"""A level of `MultiFrequency`: as it is given, and at work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nestling.optim import noise_scale

Parameters = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Factory = Callable[[list[Any]], Optimizer]


@dataclass(frozen=True)
class OptimizerLevel:
    """One level of `MultiFrequency`.

    Attributes:
        parameters: what an inner optimizer takes: tensors, (name, tensor) pairs, or parameter groups.
        period: optimizer steps between two updates; with `signal_to_noise` the most there are.
        optimizer: makes the inner optimizer from that list, for example `functools.partial(torch.optim.SGD, lr=0.1)`;
            None takes the factory of the whole `MultiFrequency`.
        signal_to_noise: update as soon as the mean of the gradients since the last update has this ratio, 1 being the
            gradient noise scale (`optim.noise_scale`), after two steps at least; None updates every `period` steps.
    """

    parameters: Parameters
    period: int = 1
    optimizer: Factory | None = None
    signal_to_noise: float | None = None


@dataclass(frozen=True)
class RunningLevel:
    """A level at work: what `MultiFrequency.levels` holds.

    Attributes:
        name: as given.
        period: steps between two updates, or the most of them.
        optimizer: the inner optimizer; its `param_groups` are a part of the whole's, its `state` is its own.
    """

    name: str
    period: int
    optimizer: Optimizer
    signal_to_noise: float | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters of the level."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def elapsed(self) -> int:
        """Steps since the level's last update, 0 to period - 1."""
        return int(self.optimizer.param_groups[0]["level_elapsed"])

    @property
    def mean_period(self) -> float:
        """Steps between two updates: the period, or of an adaptive level what it was on average; NaN before the
        first."""
        group = self.optimizer.param_groups[0]
        if self.signal_to_noise is None:
            return float(self.period)
        return group[noise_scale.STEPS] / group[noise_scale.UPDATES] if group[noise_scale.UPDATES] else math.nan


def start_level(name: str, level: OptimizerLevel, default: Factory, rate_exponent: float) -> RunningLevel:
    """A level at work, with the inner optimizer of its own or of the default factory.

    Raises:
        ValueError: no parameters, or a period or ratio that cannot be.
    """
    if isinstance(level.period, bool) or not isinstance(level.period, int) or level.period < 1:
        raise ValueError(f"the period of level {name!r} is a number of steps, 1 or more, not {level.period!r}")
    if (wanted := level.signal_to_noise) is not None and (level.period < 2 or not 0 < wanted < math.inf):
        raise ValueError(
            f"level {name!r} of period {level.period} with signal_to_noise={wanted}: the ratio is above 0, and the "
            "period, which is the longest wait then, 2 steps or more"
        )
    given: Sequence[Any] = list(level.parameters)
    if not given:
        raise ValueError(f"level {name!r} has no parameters")
    inner = (level.optimizer or default)(list(given))
    for group in inner.param_groups:
        group |= {"level": name, "level_period": level.period, "level_elapsed": 0}
        group |= {} if level.signal_to_noise is None else noise_scale.fresh()
        if "lr" in group:
            group["lr"] = group["lr"] * level.period**rate_exponent
    return RunningLevel(name, level.period, inner, level.signal_to_noise)
