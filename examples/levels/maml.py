"""MAML: knowledge passes from the slow level to the fast one as its first weights (NL Eq. 28).

    python -m examples.levels.maml

Every step draws some sine waves. In the fast level the network of each wave takes five gradient steps on ten of its
points, from the weights it is given; the slow level learns those weights through the five steps.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Adam

from nestling.levels import NestedSystem, Problem, Transfer, descent
from nestling.levels.problems import Weights

STEPS, RATE = 5, 0.05


def draw_waves(count: int, points: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points to learn from and to be judged by: x and y of each, `[count, points, 1]`."""
    amplitude, phase = torch.empty(2, count, 1, 1).uniform_(0, 1)
    amplitude, phase = 0.5 + 2 * amplitude, math.pi * phase
    x = torch.empty(2, count, points, 1).uniform_(-4, 4)
    y = amplitude * torch.sin(x + phase)
    return x[0], y[0], x[1], y[1]


def make_system(network: nn.Module) -> NestedSystem:
    """Two levels over the weights of `network`, a map of numbers."""
    names = [name for name, _ in network.named_parameters()]

    def start(batch: Any, _: Any) -> Weights:
        return {n: p.expand(len(batch[0]), *p.shape) for n, p in network.named_parameters()}

    def error(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error of every wave's own network, summed over the waves."""
        answers = vmap(partial(functional_call, network))({n: weights[n] for n in names}, x)
        return (answers - y).square().mean((1, 2)).sum()

    wave = Problem(
        name="wave",
        start=start,
        objective=lambda batch, solved: error(solved["wave"], batch[0], batch[1]),
        context=lambda batch: [batch] * STEPS,
        rule=descent(RATE),
        goal="squared error on the wave's points",
    )
    first = Problem(
        name="first weights",
        parameters=network,
        objective=lambda batch, solved: error(solved["wave"], batch[2], batch[3]) / len(batch[0]),
        optimizer=partial(Adam, lr=3e-3),
        goal="squared error after the wave's steps",
    )
    return NestedSystem.define("MAML", [wave, first], [Transfer("first weights", "wave", "initialisation", "weights")])


def main(steps: int = 400) -> list[float]:
    """Errors on unseen points after the five steps, one every step of training."""
    torch.manual_seed(0)
    system = make_system(nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)))
    errors = [system.step(draw_waves(16))["first weights"] for _ in range(steps)]
    system.print()
    print(f"error after {STEPS} steps on a new wave: at first {errors[0]:.3f}, now {sum(errors[-20:]) / 20:.3f}")
    return errors


if __name__ == "__main__":
    main()
