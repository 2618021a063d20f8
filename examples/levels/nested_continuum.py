"""The nested continuum memory of three levels (NL Eq. 70 to 72), equal to the layer of this package.

    python -m examples.levels.nested_continuum

Every level is an MLP whose last weight learns in context. At the end of its context a level starts again, from weights
that are a problem around it: they move towards what the level had learned each time (a first-order meta-gradient).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.layers.continuum import ContinuumConfig, ContinuumLevel, ContinuumMemory
from nestling.levels import NestedSystem, Problem, Transfer, descent

Token = tuple[int, Tensor]


def hidden(level: ContinuumLevel, u: Tensor) -> Tensor:
    """Hidden activation of a normalised token."""
    return F.silu(level.gate(u)) * level.up(u)


def read(layer: ContinuumMemory, solved: Any, last: int, token: Token) -> Tensor:
    """A token after the levels before `last`, each read at the weights before the token."""
    t, x = token
    for i in range(last):
        level, path = layer.levels[i], solved[f"level {i}"]
        weights = path[t // level.context][t % level.context] if level.context else path[t]
        x = x + (weights["W"] @ hidden(level, level.norm(x))[..., None])[..., 0]
    return x


def make_problem(layer: ContinuumMemory, i: int) -> Problem:
    """Level i, inside the problem of its first weights where it starts again."""
    level: ContinuumLevel = layer.levels[i]
    name, first, context = f"level {i}", f"start {i}", level.context

    def lesson(token: Token, solved: Any) -> tuple[Tensor, Tensor, Tensor]:
        u = level.norm(read(layer, solved, i, token))
        h = hidden(level, u)
        rate = torch.sigmoid(level.rate) / level.period / h.square().sum(-1).clamp_min(1)
        return h, level.value(u), rate

    def error(lesson: Any, solved: Any) -> Tensor:
        h, target, rate = lesson
        return 0.5 * (rate * ((solved[name]["W"] @ h[..., None])[..., 0] - target).square().sum(-1)).sum()

    def tokens(batch: Any) -> Iterator[Token]:
        return iter(batch) if isinstance(batch, list) else enumerate(batch.unbind(1))

    def segments(batch: Tensor) -> Iterator[list[Token]]:
        every = list(tokens(batch))
        return (every[s : s + context] for s in range(0, len(every), context))

    def initial(batch: Any, solved: Any) -> dict[str, Tensor]:
        return solved[first] if context else {"W": level.down.expand(len(batch), -1, -1)}

    words: Any = {"goal": "½|W h − v|²", "flow": "tokens", "period": level.period, "history": True, "context": tokens}
    fast = Problem(name=name, start=initial, given=lesson, objective=error, rule=descent(1.0), **words)
    if not context:
        return fast
    return Problem(
        name=first,
        start=lambda batch, _: {"W": level.down.expand(len(batch), -1, -1)},
        context=segments,
        inside=[fast],
        through=False,
        objective=lambda _, solved: 0.5 * (solved[first]["W"] - solved[name][-1]["W"]).square().sum(),
        rule=descent(torch.sigmoid(level.transfer)),
        goal=f"½|W − {name}'s|²",
        flow="tokens",
        span=context,
    )


def make_system(layer: ContinuumMemory) -> NestedSystem:
    """All levels, the fastest first."""
    problems = [make_problem(layer, i) for i in range(len(layer.levels))]
    moves = [Transfer(p.name, q.name, "initialisation", "first weights") for p in problems for q in p.inside]
    return NestedSystem.define("nested continuum", problems, moves)


def main(tokens: int = 19) -> float:
    """Largest difference from the layer."""
    torch.manual_seed(0)
    layer = ContinuumMemory(
        ContinuumConfig(hidden_size=8, intermediate_size=12, periods=(2, 4, 8), variant="nested")
    ).double()
    x, system = torch.randn(3, tokens, 8, dtype=torch.float64), make_system(layer)
    solved = system.runner.solve(x)
    mine = torch.stack([read(layer, solved, 3, token) for token in enumerate(x.unbind(1))], 1)
    difference = (mine - layer(x)[0]).abs().max().item()
    print(f"{system}largest difference from ContinuumMemory over {tokens} tokens: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
