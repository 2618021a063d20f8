"""NL Eq. 71 with nothing else: every gradient of a run in a list, and levels that look back at their period."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Update = Callable[[Tensor, Tensor], Tensor]


def run(
    weights: Sequence[Tensor],
    periods: Sequence[int],
    gradient: Callable[[Sequence[Tensor], int], Sequence[Tensor]],
    update: Callable[[int, Tensor, Tensor], Tensor],
    steps: int,
    mean: bool = False,
) -> list[list[Tensor]]:
    """Weights after each of `steps` steps.

    Args:
        weights: first weights, one tensor a level.
        periods: of the levels.
        gradient: all levels' gradients at given weights and step 1, 2, ...
        update: level, weight and summed gradient to the new weight; may keep state of its own.
        steps: in all.
        mean: divide the sum by the period.
    """
    weights, history, seen = list(weights), [], []
    for step in range(1, steps + 1):
        seen.append([g.clone() for g in gradient(weights, step)])
        for level, period in enumerate(periods):
            if step % period == 0:
                total = sum(g[level] for g in seen[step - period : step])
                weights[level] = update(level, weights[level], total / period if mean else total)
        history.append([w.clone() for w in weights])
    return history
