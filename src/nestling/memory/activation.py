"""Activations of deep memories, with their slopes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def activate(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """act(z) and act'(z)."""
    if name == "silu":
        gate = torch.sigmoid(z)
        h = z * gate
        return h, gate + h * (1 - gate)
    if name == "gelu":
        cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
        return z * cdf, cdf + z * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    return torch.relu(z), (z > 0).to(z.dtype)
