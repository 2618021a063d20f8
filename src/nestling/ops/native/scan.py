"""The compiled scan over all chunks of a sequence, as an autograd function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.ops.native.build import call, expect
from nestling.ops.native.second_order import through_torch

TOKENWISE = ("x", "g", "lr", "erase", "log_a", "q")  # fields of ScanArguments, in the order of `native_scan`


def native_scan(
    plain: Callable[..., tuple[Tensor, Tensor]],
    tensors: Sequence[Tensor | None],
    chunk_size: int,
    read_before: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs of all tokens and the weights after the last.

    Args:
        plain: the same out of torch's operations, with the tensors as arguments.
        tensors: x, g, l, e (or None), log a, q, first weight, as in `ops.chunk_rule.chunk_scan`.
        chunk_size: tokens solved at a time.
        read_before: tokens read the weights before their own write.
    """
    found: tuple[Tensor, Tensor] = _Scan.apply(plain, chunk_size, read_before, *tensors)  # type: ignore[no-untyped-call]
    return found


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plain: Any, chunk_size: int, read_before: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, g, lr, erase, log_a, q, weight = _checked(tensors)
        *batch, tokens, width = x.shape
        out, problems = g.shape[-1], x.shape[:-2].numel()
        chunk_size = min(chunk_size, tokens)
        ctx.numbers = {
            "problems": problems,
            "tokens": tokens,
            "size": chunk_size,
            "K": width,
            "V": out,
            "before": read_before,
            "threads": torch.get_num_threads(),
        }
        starts = weight.new_empty(*batch, -(-tokens // chunk_size), out, width)
        starts[..., 0, :, :] = weight
        last, y = torch.empty_like(weight), torch.empty_like(g)
        kept = torch.empty_like(g)
        tokenwise = dict(zip(TOKENWISE, (x, g, lr, erase, log_a, q), strict=True))
        results = {"starts": starts, "last": last, "y": y, "E": kept}
        call("scan", x.dtype, False, ctx.numbers | tokenwise | results)
        ctx.plain = plain
        ctx.save_for_backward(*tensors, starts, kept)
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, None, *through_torch(ctx.plain, saved[:7], (dy, d_last))
        inputs, (starts, kept) = _checked(saved[:7]), saved[7:]
        # Without an upstream gradient of y nothing writes the queries' gradient.
        found = [
            None if t is None else (torch.zeros_like(t) if i == 5 else torch.empty_like(t))
            for i, t in enumerate(inputs)
        ]
        coming = [None if t is None else t.contiguous() for t in (dy, d_last)]
        # Neither the last weights nor y are read again; the chunks' pointers into them stay unused.
        results = {"starts": starts, "last": starts, "y": kept, "E": kept}
        gradients = dict(zip((*(f"d{name}" for name in TOKENWISE), "d_weight"), found, strict=True))
        arriving = dict(zip(("dy", "d_last"), coming, strict=True))
        tokenwise = dict(zip(TOKENWISE, inputs[:6], strict=True))
        call("scan", inputs[0].dtype, True, ctx.numbers | tokenwise | results | arriving | gradients)
        return None, None, None, *found


def _checked(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Contiguous inputs, refused when compiled code would read beyond them."""
    made: list[Any] = [None if t is None else t.contiguous() for t in tensors]
    x, g, lr, erase, log_a, q, weight = made
    *batch, tokens, width = x.shape
    expect("g", g, x, *batch, tokens, g.shape[-1])
    expect("q", q, x, *x.shape)
    expect("weight", weight, x, *batch, g.shape[-1], width)
    for rate in (lr, erase, log_a):
        expect("a rate", rate, x, *batch, tokens)
    return made
