"""A hypernetwork: a slow network generates the weights of a fast one (NL section 3.3, generation).

    python -m examples.levels.hypernetwork

A task is a line y = a x + b, described by (a, b). The fast network has no learning of its own: from the description it
is made, it answers, and is gone. Only the generator learns.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from nestling.levels import NestedSystem, Problem, Transfer
from nestling.levels.problems import Weights

HIDDEN = 8


def draw_lines(count: int = 64, points: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Descriptions `[count, 2]`, inputs and targets `[count, points]`."""
    task = torch.empty(count, 2).uniform_(-1, 1)
    x = torch.empty(count, points).uniform_(-1, 1)
    return task, x, task[:, :1] * x + task[:, 1:]


def answer(weights: Weights, x: Tensor) -> Tensor:
    """The fast network, 1 -> HIDDEN -> 1, one for every row."""
    hidden = torch.tanh(x[..., None] * weights["in"][:, None] + weights["bias"][:, None])
    return (hidden * weights["out"][:, None]).sum(-1)


def make_system(generator: nn.Module) -> NestedSystem:
    """`generator` maps a description `[count, 2]` to the 3 HIDDEN weights of a row's network."""

    def generate(batch: Any, _: Any) -> Weights:
        return dict(zip(("in", "bias", "out"), generator(batch[0]).split(HIDDEN, -1), strict=True))

    def error(batch: Any, solved: Any) -> Tensor:
        return (answer(solved["network"], batch[1]) - batch[2]).square().mean()

    network = Problem(
        name="network", start=generate, objective=error, context=lambda batch: (), goal="none: it is generated"
    )
    slow = Problem(
        name="generator",
        parameters=generator,
        objective=error,
        optimizer=partial(Adam, lr=5e-3),
        goal="squared error of the network",
    )
    return NestedSystem.define(
        "hypernetwork", [network, slow], [Transfer("generator", "network", "generation", "weights")]
    )


def main(steps: int = 300) -> list[float]:
    """Errors of the generated networks, one every step."""
    torch.manual_seed(0)
    system = make_system(nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 3 * HIDDEN)))
    errors = [system.step(draw_lines())["generator"] for _ in range(steps)]
    system.print()
    print(f"error on lines never seen: at first {errors[0]:.4f}, now {sum(errors[-20:]) / 20:.4f}")
    return errors


if __name__ == "__main__":
    main()
