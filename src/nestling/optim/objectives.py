"""Inner losses and retentions of the rules that solve a small problem of their own at every step (NL Definition 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

InnerLoss = Callable[[Tensor, Tensor], Tensor]
Retention = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """An inner loss.

    Attributes:
        loss: of outputs `[n, out]` and targets `[n, out]`, one number a row, `[n]`.
        smoothness: bound of its second derivative in the output, which sets the inner step.
    """

    loss: InnerLoss
    smoothness: float


# Functions with names, so that an optimizer can be pickled.
def _dot(y: Tensor, u: Tensor) -> Tensor:
    return -(y * u).sum(-1)


def _l2(y: Tensor, u: Tensor) -> Tensor:
    return 0.5 * (y - u).square().sum(-1)


def _huber(y: Tensor, u: Tensor) -> Tensor:
    return F.huber_loss(y, u, reduction="none").sum(-1)


DOT = Objective(_dot, 0.0)
"""-<y, u>: with the surprise as target this is gradient descent (Eq. 55), and momentum for a momentum (Eq. 46)."""

L2 = Objective(_l2, 1.0)
"""1/2 |y - u|^2: delta gradient descent (Eq. 56), and delta momentum for a momentum (Eq. 48)."""

HUBER = Objective(_huber, 1.0)
"""Huber's loss of every coordinate, width 1: one outlier pulls with a force of at most 1."""


def squared_distance(w: Tensor, kept: Tensor) -> Tensor:
    """1/2 |W - W_t|^2, the retention of Eq. 55 and 56; it is divided by the learning rate."""
    return 0.5 * (w - kept).square().sum()
