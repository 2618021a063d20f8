"""The compiled short convolution, as an autograd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestling.ops.native.build import call
from nestling.ops.native.second_order import through_torch


def native_short_conv(plain: Callable[[Tensor, Tensor], Tensor], seen: Tensor, weight: Tensor) -> Tensor:
    """y_t = sum_w weight[:, w] * seen_{t + w}: `[N, L + W - 1, D]` and `[D, W]` to `[N, L, D]`.

    `plain` is the same out of torch's operations.
    """
    y: Tensor = _ShortConv.apply(plain, seen, weight)  # type: ignore[no-untyped-call]
    return y


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plain: Any, seen: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(seen, weight)
        ctx.plain = plain
        seen, weight = seen.contiguous(), weight.contiguous()
        rows, time, channels = seen.shape
        y = seen.new_empty(rows, time - weight.shape[1] + 1, channels)
        _call(seen, weight, {"y": y}, back=False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        seen, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *through_torch(lambda *t: (ctx.plain(*t),), (seen, weight), (dy,))
        seen, weight = seen.contiguous(), weight.contiguous()
        found = torch.empty_like(seen), torch.empty_like(weight)
        others = {"y": None, "dy": dy.contiguous(), "dseen": found[0], "dweight": found[1]}
        _call(seen, weight, others, back=True)
        return None, *found


def _call(seen: Tensor, weight: Tensor, others: dict[str, Tensor | None], back: bool) -> None:
    rows, time, channels = seen.shape
    taps = weight.shape[1]
    numbers = {
        "rows": rows,
        "time": time - taps + 1,
        "channels": channels,
        "taps": taps,
        "threads": torch.get_num_threads(),
    }
    call("short_conv", seen.dtype, back, {**numbers, "seen": seen, "weight": weight, **others})
