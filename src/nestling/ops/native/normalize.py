"""Compiled normalisation of rows, as an autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nestling.ops.native.build import library, pointers, sizes


def native_normalize(x: Tensor, eps: float, bound: float) -> Tensor:
    """x / sqrt(|x|^2 + eps^2) over the last dimension, entries cut at +-bound."""
    y: Tensor = _Normalize.apply(x, eps, bound)  # type: ignore[no-untyped-call]
    return y


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, bound: float) -> Tensor:
        x = x.contiguous()
        y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1])
        _call((x, y, scale), eps, bound, back=False)
        ctx.save_for_backward(x, y, scale)
        ctx.bound = bound
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, y, scale = ctx.saved_tensors
        dx = torch.empty_like(x)
        _call((x, y, scale, dy.contiguous(), dx), 0.0, ctx.bound, back=True)
        return dx, None, None


def _call(tensors: tuple[Tensor, ...], eps: float, bound: float, back: bool) -> None:
    kernel = library()
    assert kernel is not None
    x, _, scale, *_ = tensors
    numbers = sizes(scale.numel(), x.shape[-1], torch.get_num_threads())
    kernel.nestling_normalize(numbers, eps, bound, pointers(tensors), int(x.dtype == torch.float64), int(back))
