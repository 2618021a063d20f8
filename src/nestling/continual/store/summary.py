"""How much a memory has learned, and where."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from nestling.continual.store.memory import Memory
from nestling.continual.store.merge import OTHER_LEVEL, level_of
from nestling.continual.store.records import dot, tensors_of

LAYER = re.compile(r"\.(\d{1,6})\.")  # no model has more, and Python reads no number of thousands of digits


@dataclass(frozen=True)
class LevelSummary:
    """One level of a memory.

    Attributes:
        level: its name; "no level" for parameters that belong to none.
        period: tokens between two updates; None for "no level".
        parameters: tensors in it.
        changed: of these, how many differ from the base.
        norm: Frobenius norm of their differences together.
    """

    level: str
    period: int | None
    parameters: int
    changed: int
    norm: float


@dataclass(frozen=True)
class Summary:
    """What a memory holds.

    Attributes:
        levels: fastest first.
        layers: norm of the difference by the number in a parameter's name; -1 for names without one.
        difference_bytes: of the differences as held in memory.
        learner_bytes: of what only a learner needs.
    """

    levels: list[LevelSummary]
    layers: dict[int, float]
    difference_bytes: int
    learner_bytes: int


def summarize(memory: Memory) -> Summary:
    """Norms per level and per layer, and sizes."""
    levels = level_of(memory)
    squares: dict[str, float] = {}
    layers: dict[int, float] = {}
    size = 0
    for name, difference in memory.differences.items():
        squares[name] = dot(difference, difference)
        found = LAYER.search(name)
        layer = int(found[1]) if found else -1
        layers[layer] = layers.get(layer, 0.0) + squares[name]
        size += sum(t.numel() * t.element_size() for t in tensors_of(difference))
    rows = []
    for level, period in memory.periods.items():
        members = memory.parameters[level]
        held = [squares[n] for n in members if n in squares]
        rows.append(LevelSummary(level, period, len(members), sum(s > 0 for s in held), math.sqrt(sum(held))))
    if rest := [s for n, s in squares.items() if n not in levels]:
        rows.append(LevelSummary(OTHER_LEVEL, None, len(rest), sum(s > 0 for s in rest), math.sqrt(sum(rest))))
    norms = {layer: math.sqrt(square) for layer, square in sorted(layers.items())}
    return Summary(rows, norms, size, memory.nbytes - size)
