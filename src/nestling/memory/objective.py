"""Gradients of the inner objectives at a memory's output."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.memory.rule import Rule


def output_gradient(
    rule: Rule, output: Float[Tensor, "*batch V"], target: Float[Tensor, "*#batch V"]
) -> Float[Tensor, "*#batch V"]:
    """dL/dy of `rule.objective`, every coordinate clipped to +-`rule.clip`.

    "l2": y - v. "dot": -v. "lp": sign(y - v) |y - v|^(p-1) (Miras, Moneta). "huber": y - v clipped to +-delta (Miras,
    Yaad).
    """
    if rule.objective == "dot":
        gradient = -target
    elif rule.objective == "l2":
        gradient = output - target
    elif rule.objective == "huber":
        gradient = (output - target).clamp(-rule.delta, rule.delta)
    else:
        error = output - target
        gradient = error.sign() * error.abs().clamp_min(1e-12).pow(rule.p - 1)
    return gradient.clamp(-rule.clip, rule.clip)


def inner_loss(rule: Rule, output: Float[Tensor, "*batch V"], target: Float[Tensor, "*batch V"]) -> Tensor:
    """The objective itself, summed over the last dimension; for reference implementations and instruments."""
    if rule.objective == "dot":
        return -(output * target).sum(-1)
    error = output - target
    if rule.objective == "l2":
        return 0.5 * error.square().sum(-1)
    if rule.objective == "huber":
        per_coordinate = torch.where(
            error.abs() <= rule.delta, 0.5 * error.square(), rule.delta * (error.abs() - 0.5 * rule.delta)
        )
        return per_coordinate.sum(-1)
    return error.abs().pow(rule.p).sum(-1) / rule.p
