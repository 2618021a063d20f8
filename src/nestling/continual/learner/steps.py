"""What happens around a level's step: retention, the length of the step, and the replayed gradient's veto.

Pure arithmetic on lists of tensors, all in place; norms and products are over the whole list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def retain(anchored: Sequence[tuple[Tensor, Tensor]], kept: float) -> None:
    """W <- W_0 + kept (W - W_0): L2-SP (arXiv:1802.01483) decoupled from the gradient, as AdamW decouples decay.

    With kept = 1 - lr * strength it is the step of gradient descent on strength / 2 |W - W_0|^2.

    Args:
        anchored: (W, W_0) of every parameter.
        kept: fraction in [0, 1].
    """
    if kept == 1 or not anchored:
        return
    torch._foreach_lerp_([w for w, _ in anchored], [base for _, base in anchored], 1 - kept)


@torch.no_grad()
def limit_step(weights: Sequence[Tensor], before: Sequence[Tensor], longest: float) -> float:
    """W <- W' + min(1, m / |W - W'|) (W - W'), with W' the weights before the step and m the longest step.

    Returns:
        The factor.
    """
    steps = torch._foreach_sub(list(weights), list(before))
    length = norm(steps)
    if length <= longest:
        return 1.0
    factor = longest / length
    torch._foreach_mul_(steps, factor)
    for w, old, step in zip(weights, before, steps, strict=True):
        w.copy_(old).add_(step)
    return factor


@torch.no_grad()
def project(gradients: Sequence[Tensor], replayed: Sequence[Tensor]) -> float:
    """g <- g - (g . r / r . r) r where g . r < 0 (A-GEM, arXiv:1812.00420).

    A step against g then does not raise the replayed loss, to first order.

    Returns:
        The multiple of r that was taken out; 0 where g and r agree.
    """
    product, square = dot(gradients, replayed), dot(replayed, replayed)
    if product >= 0 or square == 0:
        return 0.0
    torch._foreach_add_(list(gradients), list(replayed), alpha=-product / square)
    return product / square


def norm(tensors: Sequence[Tensor]) -> float:
    """Frobenius norm of all of them together; NaN or infinity if one holds such."""
    if not tensors:
        return 0.0
    found: dict[torch.device, list[Tensor]] = {}
    for value in torch._foreach_norm(list(tensors)):
        found.setdefault(value.device, []).append(value.double())
    # One transfer from each device: waiting for every tensor's own would cost a GPU more than the step.
    return math.hypot(*(float(torch.linalg.vector_norm(torch.stack(own))) for own in found.values()))


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Sum of all products."""
    return sum(float(torch.dot(x.flatten(), y.flatten())) for x, y in zip(a, b, strict=True))
