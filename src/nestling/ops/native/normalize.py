"""Compiled normalisation of rows, as an autograd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestling.ops.native.build import call
from nestling.ops.native.second_order import through_torch


def native_normalize(plain: Callable[[Tensor, float, float], Tensor], x: Tensor, eps: float, bound: float) -> Tensor:
    """x / sqrt(|x|^2 + eps^2) over the last dimension, entries cut at +-bound.

    `plain` is the same out of torch's operations.
    """
    y: Tensor = _Normalize.apply(plain, x, eps, bound)  # type: ignore[no-untyped-call]
    return y


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plain: Any, x: Tensor, eps: float, bound: float) -> Tensor:
        given, x = x, x.contiguous()
        y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1])
        _call(x, y, scale, eps, bound)
        ctx.save_for_backward(given, y, scale)
        ctx.plain, ctx.eps, ctx.bound = plain, eps, bound
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = through_torch(lambda *t: (ctx.plain(*t),), (x, ctx.eps, ctx.bound), (dy,))
            return None, *found
        x = x.contiguous()
        dx = torch.empty_like(x)
        _call(x, y, scale, 0.0, ctx.bound, {"dy": dy.contiguous(), "dx": dx})
        return None, dx, None, None


def _call(
    x: Tensor, y: Tensor, scale: Tensor, eps: float, bound: float, gradients: dict[str, Tensor] | None = None
) -> None:
    numbers = {"rows": scale.numel(), "width": x.shape[-1], "threads": torch.get_num_threads()}
    arguments = {**numbers, "eps": eps, "bound": bound, "x": x, "y": y, "scale": scale, **(gradients or {})}
    call("normalize", x.dtype, gradients is not None, arguments)
