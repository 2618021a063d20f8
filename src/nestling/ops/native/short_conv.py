"""The compiled short convolution, as an autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nestling.ops.native.build import library, pointers, sizes


def native_short_conv(seen: Tensor, weight: Tensor) -> Tensor:
    """y_t = sum_w weight[:, w] * seen_{t + w}: `[N, L + W - 1, D]` and `[D, W]` to `[N, L, D]`."""
    y: Tensor = _ShortConv.apply(seen, weight)  # type: ignore[no-untyped-call]
    return y


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, seen: Tensor, weight: Tensor) -> Tensor:
        seen, weight = seen.contiguous(), weight.contiguous()
        rows, time, channels = seen.shape
        y = seen.new_empty(rows, time - weight.shape[1] + 1, channels)
        _call(seen, weight, (y,), back=False)
        ctx.save_for_backward(seen, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        seen, weight = ctx.saved_tensors
        found = torch.empty_like(seen), torch.empty_like(weight)
        _call(seen, weight, (dy.contiguous(), *found), back=True)
        return found


def _call(seen: Tensor, weight: Tensor, others: tuple[Tensor, ...], back: bool) -> None:
    kernel = library()
    assert kernel is not None
    rows, time, channels = seen.shape
    taps = weight.shape[1]
    numbers = sizes(rows, time - taps + 1, channels, taps, torch.get_num_threads())
    kernel.nestling_short_conv(numbers, pointers((seen, weight, *others)), int(seen.dtype == torch.float64), int(back))
