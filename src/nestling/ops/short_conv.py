"""Causal depthwise convolution over a few tokens, with its tail as state."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.ops import native


def short_conv(
    x: Float[Tensor, "N L D"],
    weight: Float[Tensor, "D W"],
    tail: Float[Tensor, "N W-1 D"],
    lengths: Tensor | None = None,
) -> tuple[Float[Tensor, "N L D"], Float[Tensor, "N W-1 D"]]:
    """y_t = sum_w weight[:, w] * x_{t - W + 1 + w}, the tokens before the first taken from `tail`.

    Args:
        x: left-aligned rows.
        weight: one filter of width W a channel; the last tap is the token itself.
        tail: the last W - 1 inputs of the call before (zeros at a document's start).
        lengths: `[N]` real tokens of every row; None when all are real.

    Returns:
        y and the new tail: the last W - 1 real inputs of every row, counting the old tail.
    """
    width = weight.shape[1]
    if width == 1:
        return x * weight[:, 0], tail
    seen = torch.cat([tail.to(x.dtype), x], dim=1)
    if native.fits(seen) and weight.dtype == seen.dtype:
        y = native.native_short_conv(_plain, seen, weight)
    else:
        y = _plain(seen, weight)
    return y, last_inputs(seen, width - 1, lengths).to(tail.dtype)


def last_inputs(seen: Tensor, past: int, lengths: Tensor | None, dim: int = 1) -> Tensor:
    """The last `past` real entries of every row along `dim`.

    Args:
        seen: `[N, ...]` rows of `past` earlier entries and the new ones, left-aligned.
        past: entries kept.
        lengths: `[N]` real new entries of every row, on the CPU; None when all are real.
        dim: the dimension of the entries.
    """
    if lengths is None:
        return seen.narrow(dim, seen.shape[dim] - past, past)
    slots = lengths[:, None] + torch.arange(past, device="cpu")
    shape = [len(seen), *[1] * (seen.dim() - 1)]
    shape[dim] = past
    sizes = [-1 if d in (0, dim) else size for d, size in enumerate(seen.shape)]
    return seen.gather(dim, slots.to(seen.device).reshape(shape).expand(sizes))


def _plain(seen: Tensor, weight: Tensor) -> Tensor:
    taps = weight.shape[1]
    time = seen.shape[1] - taps + 1
    y = seen[:, taps - 1 :] * weight[:, taps - 1]
    for w in range(taps - 1):
        y = torch.addcmul(y, seen[:, w : w + time], weight[:, w])
    return y
