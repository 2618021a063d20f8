"""Momenta and second moments entry by entry, and AdamW's step made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestling.optim.memories import Memories


def accumulate(memories: list[Tensor], values: list[Tensor], kept: float, average: bool) -> None:
    """m <- kept m + v, or with `average` the exponential mean m <- kept m + (1 - kept) v, in place."""
    if average:
        torch._foreach_lerp_(memories, values, 1 - kept)
    else:
        torch._foreach_mul_(memories, kept)
        torch._foreach_add_(memories, values)


def accumulate_squares(memories: list[Tensor], values: list[Tensor], kept: float, added: float) -> None:
    """h <- kept h + added v^2, in place."""
    if kept != 1:
        torch._foreach_mul_(memories, kept)
    torch._foreach_addcmul_(memories, values, values, value=added)


def root(second_moments: list[Tensor], divisors: list[float], eps: float) -> list[Tensor]:
    """sqrt(h / divisor) + eps, new tensors."""
    roots = torch._foreach_sqrt(second_moments)
    torch._foreach_div_(roots, [d**0.5 for d in divisors])
    torch._foreach_add_(roots, eps)
    return list(roots)


def adamw_directions(group: dict[str, Any], memories: Memories, gradients: list[Tensor]) -> list[Tensor]:
    """d of AdamW (Loshchilov and Hutter 2019): mean over root of second moment, corrected for their zero start."""
    beta1, beta2 = group["adamw_betas"]
    means, squares = memories.tensors("exp_avg"), memories.tensors("exp_avg_sq")
    accumulate(means, gradients, beta1, average=True)
    accumulate_squares(squares, gradients, beta2, 1 - beta2)
    directions = torch._foreach_div(means, root(squares, [1 - beta2**t for t in memories.steps], group["adamw_eps"]))
    torch._foreach_div_(directions, [1 - beta1**t for t in memories.steps])
    return list(directions)


def adamw_settings(betas: tuple[float, float], eps: float) -> dict[str, Any]:
    """Group defaults of the AdamW step that embeddings, heads, gains and biases take.

    Raises:
        ValueError: a beta outside [0, 1), or eps not positive.
    """
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ValueError(f"adamw_betas must be two numbers in [0, 1), got {betas}")
    if eps <= 0:
        raise ValueError(f"adamw_eps must be positive, got {eps}")
    return {"adamw_betas": tuple(betas), "adamw_eps": eps}
