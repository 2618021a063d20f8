"""Rotary positions (Su et al. 2021)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def rotate(
    x: Float[Tensor, "*batch D"], cos: Float[Tensor, "*angles D/2"], sin: Float[Tensor, "*angles D/2"]
) -> Float[Tensor, "*batch D"]:
    """Turn every pair (i, i + D / 2) of channels by its angle, in float32 or better.

    `cos` and `sin` are broadcast over the dimensions of `x` before the last.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    a, b = x.to(dtype).chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)
