"""Settings chosen from a grid that grows until the best is inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Options = Mapping[str, float]
Score = float | tuple[float, ...]
Neighbour = Callable[[str, Sequence[float], bool], float | None]
"""`neighbour(name, values, up)`: the value of a setting beyond the sorted values tried, above or below; None for an end
of the grid."""

RATES = (3e-5, 1e-4, 3e-4, 1e-3)
LOWEST, HIGHEST = 1e-7, 1.0


@dataclass
class Grid:
    """What was tried, and the best of it.

    Attributes:
        tried: settings, in the order of trial.
        scores: of each, lower is better.
    """

    tried: list[Options] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)

    @property
    def best(self) -> Options:
        """The settings of the lowest finite score, the first of equals; with none finite those of the lowest values."""
        finite = [i for i, score in enumerate(self.scores) if is_finite(score)]
        if not finite:
            return min(self.tried, key=lambda options: tuple(options.values()))
        return self.tried[min(finite, key=lambda i: self.scores[i])]


def grow(measure: Callable[[Options], Score], grid: Sequence[Options], neighbour: Neighbour) -> Grid:
    """Measure a grid, and go on where the best has the smallest or largest value of a setting.

    Beside the best, the next value of that setting is tried with its others as they are, until none is better. A score
    that is not finite is no candidate; with none finite, only lower values are tried.

    Args:
        measure: of settings; lower is better.
        grid: to begin with. A setting with a single value in it is fixed.
        neighbour: how the grid goes on; `fixed` for one that does not.
    """
    found = Grid()

    def add(options: Options) -> None:
        found.tried.append(options)
        found.scores.append(measure(options))

    for options in grid:
        add(options)
    while True:
        best, hopeless = found.best, not any(is_finite(score) for score in found.scores)
        for options in beyond(found.tried, best, neighbour, downwards=hopeless):
            add(options)
        if found.best is best:
            return found


def beyond(
    tried: Sequence[Options], best: Options, neighbour: Neighbour, *, downwards: bool = False
) -> list[dict[str, float]]:
    """The neighbours of `best` outside of what was tried, `downwards` those below alone."""
    found = []
    for name, value in best.items():
        values = sorted({options[name] for options in tried})
        for up in (False,) if downwards else (False, True):
            if len(values) > 1 and value == values[-1 if up else 0]:
                new = neighbour(name, values, up)
                if new is not None:
                    found.append({**best, name: new})
    return found


def grow_rate(
    measure: Callable[[float], float], rates: Sequence[float] = RATES, neighbour: Neighbour | None = None
) -> dict[float, float]:
    """A learning rate alone: the measure at every rate tried, by rising rate.

    Args:
        measure: of a rate; lower is better.
        rates: to begin with.
        neighbour: None is 1, 3, 10, 30, ... from 1e-7 to 1.
    """
    found = grow(lambda options: measure(options["lr"]), [{"lr": rate} for rate in sorted(rates)], neighbour or threes)
    scores = {options["lr"]: score for options, score in zip(found.tried, found.scores, strict=True)}
    return {rate: float(scores[rate]) for rate in sorted(scores)}  # type: ignore[arg-type]


def best_rate(found: Mapping[float, float]) -> float:
    """The rate of the smallest finite measure, the lower of equals; with none finite the lowest rate."""
    return Grid([{"lr": rate} for rate in sorted(found)], [found[rate] for rate in sorted(found)]).best["lr"]


def threes(name: str, values: Sequence[float], up: bool) -> float | None:
    """On as 1, 3, 10, 30, ..., from 1e-7 to 1."""
    edge = values[-1 if up else 0]
    if edge >= HIGHEST * 0.999 if up else edge <= LOWEST * 1.001:
        return None
    return next_rate(edge, up)


def times(factor: float) -> Neighbour:
    """On by a factor, to six digits, down to 1e-7."""

    def neighbour(name: str, values: Sequence[float], up: bool) -> float | None:
        new = values[-1] * factor if up else values[0] / factor
        return float(f"{new:.6g}") if new >= LOWEST else None

    return neighbour


def fixed(name: str, values: Sequence[float], up: bool) -> None:
    """The grid stays as it is."""


def next_rate(rate: float, up: bool) -> float:
    """The neighbour in 1, 3, 10, 30, ... of one of them."""
    exponent = math.floor(math.log10(rate * 1.001))
    first = round(rate / 10**exponent) == 1
    factor = (3 if first else 10) if up else (0.3 if first else 1)
    return float(f"{factor * 10.0**exponent:.6g}")


def is_finite(score: Score) -> bool:
    """All of it."""
    return all(math.isfinite(value) for value in (score if isinstance(score, tuple) else (score,)))
