"""The compiled rule with a retention by channel over a whole sequence, as an autograd function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.ops.native.build import call, expect
from nestling.ops.native.second_order import through_torch

TOKENWISE = ("k", "v", "q", "log_a", "b", "c")  # fields of DiagonalArguments, in the order of `native_diagonal`


def native_diagonal(
    plain: Callable[..., tuple[Tensor, Tensor]], tensors: Sequence[Tensor | None], chunk_size: int, bound: float
) -> tuple[Tensor, Tensor]:
    """Outputs of all tokens and the weights after the last.

    Args:
        plain: the same out of torch's operations, with the tensors as arguments.
        tensors: k, v, q, log a, b and c (or None), first weight, as in `ops.diagonal_rule.diagonal_scan`.
        chunk_size: tokens between two weights that are kept for the backward pass.
        bound: of the weights where a chunk begins.
    """
    found: tuple[Tensor, Tensor] = _Diagonal.apply(plain, chunk_size, bound, *tensors)  # type: ignore[no-untyped-call]
    return found


class _Diagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plain: Any, chunk_size: int, bound: float, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        k, v, q, log_a, b, c, weight = _checked(tensors)
        *batch, tokens, width = k.shape
        ctx.numbers = {
            "problems": k.shape[:-2].numel(),
            "tokens": tokens,
            "size": chunk_size,
            "K": width,
            "V": v.shape[-1],
            "threads": torch.get_num_threads(),
            "bound": bound,
        }
        starts = weight.new_empty(*batch, -(-tokens // chunk_size), *weight.shape[-2:])
        last, y, u = torch.empty_like(weight), torch.empty_like(v), torch.empty_like(v)
        tokenwise = dict(zip(TOKENWISE, (k, v, q, log_a, b, c), strict=True))
        results = {"weight": weight, "starts": starts, "last": last, "y": y, "u": u}
        call("diagonal", k.dtype, False, ctx.numbers | tokenwise | results)
        ctx.plain = plain
        ctx.save_for_backward(*tensors, starts, u)
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, None, *through_torch(ctx.plain, saved[:7], (dy, d_last))
        inputs, (starts, u) = _checked(saved[:7]), saved[7:]
        found = [None if t is None else torch.empty_like(t) for t in inputs]
        coming = [None if t is None else t.contiguous() for t in (dy, d_last)]
        # Neither the last weights nor y are read again.
        results = {"weight": inputs[6], "starts": starts, "last": starts, "y": u, "u": u}
        gradients = dict(zip((*(f"d{name}" for name in TOKENWISE), "d_weight"), found, strict=True))
        arriving = dict(zip(("dy", "d_last"), coming, strict=True))
        tokenwise = dict(zip(TOKENWISE, inputs[:6], strict=True))
        call("diagonal", inputs[0].dtype, True, ctx.numbers | tokenwise | results | arriving | gradients)
        return None, None, None, *found


def _checked(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Contiguous inputs, refused when compiled code would read beyond them."""
    made: list[Any] = [None if t is None else t.contiguous() for t in tensors]
    k, v, q, log_a, b, c, weight = made
    *batch, tokens, width = k.shape
    for name, tensor in {"q": q, "log_a": log_a, "recall_key": b, "erase_key": c}.items():
        expect(name, tensor, k, *k.shape)
    expect("v", v, k, *batch, tokens, v.shape[-1])
    expect("weight", weight, k, *batch, v.shape[-1], width)
    return made
