"""Rotary positions (Su et al. 2021, arXiv:2104.09864): pairs of channels turn by an angle that grows with time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotation(
    width: int,
    theta: float | Sequence[float],
    start: Int[Tensor, " N"] | None,
    time: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[1 or N, time, 1, width / 2]` of `time` tokens; N only when the rows' positions differ.

    Angles are taken in float64: float32 has no digits left for the fast channels at position 10^6.

    Args:
        width: of a head, even.
        theta: base of the frequencies, channel pair i turns by theta^(-2 i / width) a token; or these `width / 2`
            angles themselves, in radians.
        start: position of every row's first token, int64 on the CPU; None is 0.
        time: tokens.
        device: of the result.
    """
    position = torch.arange(time, device=device)[None]
    if start is not None:
        # A number needs no transfer to a GPU.
        alike = len(start) > 0 and bool((start == start[0]).all())
        position = position + (int(start[0]) if alike else start.to(device)[:, None])
    if isinstance(theta, Sequence):
        frequency = torch.tensor(theta, device=device, dtype=torch.float64)
    else:
        frequency = theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
    angle = position[:, :, None, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Float[Tensor, "N T H D"], cos: Tensor, sin: Tensor) -> Float[Tensor, "N T H D"]:
    """Turn every pair (i, i + D / 2) of channels by its angle, in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    a, b = x.to(dtype).chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)
