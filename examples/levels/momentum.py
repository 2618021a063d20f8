"""Gradient descent with momentum as a system of two levels (NL Eq. 10 to 13).

    python -m examples.levels.momentum

The momentum m is a memory that compresses gradients: it minimises -<m, grad L(W)>, and a decay of its own forgets. The
weights follow it: they minimise <W, m>. Both by plain gradient descent, m first, since W waits for it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from nestling.levels import NestedSystem, Problem, Transfer


def loss(weight: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Squared error of the linear model `x W^T` on inputs `[B, in]` and targets `[B, out]`."""
    return (batch[0] @ weight.mT - batch[1]).square().mean()


def two_levels(weight: Tensor, lr: float, momentum: float) -> NestedSystem:
    """`torch.optim.SGD(lr, momentum)` on `weight`: m <- momentum m + grad, then W <- W - lr m."""
    memory = nn.Parameter(torch.zeros_like(weight))

    def surprise(batch: Any, _: Any) -> Tensor:
        (gradient,) = torch.autograd.grad(loss(weight, batch), weight)
        return -(memory * gradient).sum()

    return NestedSystem.define(
        "gradient descent with momentum",
        [
            Problem(
                name="momentum",
                parameters=[memory],
                objective=surprise,
                optimizer=partial(SGD, lr=1.0, weight_decay=1 - momentum),
                goal="−⟨m, g⟩ + decay",
                flow="gradients",
                feeds=("weights",),
            ),
            Problem(
                name="weights",
                parameters=[weight],
                objective=lambda batch, _: (weight * memory.detach()).sum(),
                optimizer=partial(SGD, lr=lr),
                goal="⟨W, m⟩",
            ),
        ],
        [
            Transfer("weights", "momentum", "generation", "gradients"),
            Transfer("momentum", "weights", "parametric", "update"),
        ],
    )


def main() -> None:
    """Fifty steps beside `torch.optim.SGD`."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    system, optimizer = two_levels(ours, 0.05, 0.9), SGD([theirs], lr=0.05, momentum=0.9)
    difference = 0.0
    for _ in range(50):
        batch = torch.randn(8, 4), torch.randn(8, 3)
        system.step(batch)
        optimizer.zero_grad()
        loss(theirs, batch).backward()
        optimizer.step()
        difference = max(difference, (ours - theirs).abs().max().item())
    print(f"{system}largest difference from torch.optim.SGD in 50 steps: {difference:.1e}")


if __name__ == "__main__":
    main()
