"""A learned optimizer: the rule of the fast level is itself learned by the slow one (NL sections 3.3 and 6).

    python -m examples.levels.learned_optimizer

The fast level descends a quadratic valley for twenty steps. Its rule is a small network that sees the gradient and two
momenta of every coordinate; the slow level learns that network from the losses along the way.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from nestling.levels import NestedSystem, Problem, Transfer, descent
from nestling.levels.problems import Rule, Weights

STEPS = 20

CURVATURE = torch.logspace(-1.7, 0, 6)


def height(w: Tensor) -> Tensor:
    """Of the valley at `[count, 6]` points, summed."""
    return 0.5 * (CURVATURE * w.square()).sum()


class LearnedRule(nn.Module):
    """The step of a coordinate from its gradient and momenta of time constants 2 and 10."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1, bias=False))
        self.rates = nn.Parameter(torch.tensor([0.5, 0.0, 0.0]))

    def forward(self, weights: Weights, gradients: Weights, memory: Any) -> tuple[Weights, Any]:
        """New weights, and the two momenta."""
        g = gradients["w"]
        old = torch.zeros_like(torch.stack([g, g])) if memory is None else memory
        momenta = old + torch.tensor([0.5, 0.1])[:, None, None] * (g - old)
        seen = torch.stack([g, *momenta], -1)
        return {"w": weights["w"] - seen @ self.rates - 0.1 * self.net(seen).squeeze(-1)}, momenta


def make_system(rule: Rule, learned: nn.Module | None = None) -> NestedSystem:
    """The fast level with `rule`, and above it the level that learns the parameters of `learned`."""
    problems = [
        Problem(
            name="path",
            start=lambda batch, _: {"w": batch},
            objective=lambda batch, solved: height(solved["path"]["w"]),
            context=lambda batch: [batch] * STEPS,
            rule=rule,
            history=True,
            goal="the valley's height",
        )
    ]
    if learned is None:
        return NestedSystem.define("fixed rule", problems)

    def mean_height(batch: Any, solved: Any) -> Tensor:
        return sum(height(w["w"]) for w in solved["path"][1:]) / len(batch)

    problems.append(Problem(name="rule", parameters=learned, objective=mean_height, optimizer=partial(Adam, lr=1e-2)))
    return NestedSystem.define("learned optimizer", problems, [Transfer("rule", "path", "parametric", "the rule")])


def main(steps: int = 150) -> tuple[float, float]:
    """Height after twenty steps: the best fixed rate's, the learned rule's."""
    torch.manual_seed(0)
    system = make_system(rule := LearnedRule(), rule)
    for _ in range(steps):
        system.step(torch.randn(32, 6))
    test = torch.randn(256, 6)
    fixed = min(make_system(descent(0.1 * i)).step(test)["path"] for i in range(1, 20)) / 256
    learned = make_system(rule).step(test)["path"] / 256
    print(f"{system}height after {STEPS} steps: best fixed rate {fixed:.4f}, learned rule {learned:.4f}")
    return fixed, learned


if __name__ == "__main__":
    main()
