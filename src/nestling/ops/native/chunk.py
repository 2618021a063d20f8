"""The compiled chunk as an autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nestling.ops.native.build import library, pointers, sizes


def native_chunk(
    tensors: Sequence[Tensor | None], options: tuple[int, bool, bool]
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`ops.chunk_step.chunk_step`.

    Args:
        tensors: x, g, l, e, log a, log b, valid, weight, surprise, X W_0^T, q.
        options: answers, normalise, read_before.
    """
    found: tuple[Tensor | None, Tensor, Tensor | None] = _Chunk.apply(*tensors, options)  # type: ignore[no-untyped-call]
    return found


class _Chunk(torch.autograd.Function):
    """Gradients of every floating-point argument; not twice differentiable."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, Tensor, Tensor | None]:
        options: tuple[int, bool, bool]
        *tensors, options = arguments
        ctx.batch = batch = tensors[0].shape[:-3]
        ctx.shapes = [None if t is None else t.shape for t in tensors]
        inputs: list[Any] = [_flat(t, batch) for t in tensors]
        x, g, _, erase, _, log_b, _, weight, surprise, recalled, q = inputs
        problems, memories, chunk, width = x.shape
        numbers = [problems, memories, chunk, width, g.shape[-1], *map(int, options), torch.get_num_threads()]

        read: Any = None if q is None else x.new_empty(problems, chunk, options[0])
        momentum, erases = log_b is not None, erase is not None
        results: list[Any] = [read, torch.empty_like(weight), None if surprise is None else torch.empty_like(surprise)]
        kept = [
            torch.empty_like(g),
            torch.empty_like(g) if erases and recalled is None else None,
            torch.empty_like(g) if erases and momentum else None,
            None if read is None else torch.empty_like(read),
            torch.empty_like(read) if momentum and read is not None else None,
        ]
        _call(numbers, [*inputs, *results, *kept], weight.dtype, backward=False)
        ctx.save_for_backward(*inputs, *kept)
        ctx.numbers = numbers
        ctx.set_materialize_grads(False)
        y, after, pushed = (None if t is None else t.unflatten(0, batch) for t in results)
        assert after is not None
        return y, after, pushed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, kept = saved[:11], saved[11:]
        x, g, lr, erase, log_a, log_b, _, weight, surprise, recalled, q = inputs
        per_memory = x.shape[:3]
        found = [
            torch.empty_like(x),
            torch.empty_like(g),
            *(None if r is None else r.new_empty(per_memory) for r in (lr, erase, log_a, log_b)),
            torch.empty_like(weight),
            *(None if t is None else torch.empty_like(t) for t in (surprise, recalled)),
            None if q is None else (torch.empty_like(q) if upstream[0] is not None else torch.zeros_like(q)),
        ]
        coming = [None if t is None else t.contiguous() for t in upstream]
        _call(ctx.numbers, [*inputs, None, None, None, *kept, *coming, *found], weight.dtype, backward=True)
        dx, dg, *rates, d_weight, d_surprise, d_recalled, dq = found
        if per_memory[1] == 1:
            rates = [None if r is None else r[:, 0] for r in rates]
        else:
            rates = [None if r is None else r.sum(1) for r in rates]
        made = (dx, dg, *rates, None, d_weight, d_surprise, d_recalled, dq)
        return *(None if d is None else d.view(s) for d, s in zip(made, ctx.shapes, strict=True)), None


def _flat(t: Tensor | None, batch: torch.Size) -> Tensor | None:
    """Batch dimensions as one; where they are missing, repeated (`valid`, which every head shares)."""
    return None if t is None else t.expand(*batch, *t.shape[len(batch) :]).flatten(0, len(batch) - 1).contiguous()


def _call(numbers: list[int], tensors: list[Tensor | None], dtype: torch.dtype, backward: bool) -> None:
    kernel = library()
    assert kernel is not None
    kernel.nestling_chunk(sizes(*numbers), pointers(tensors), int(dtype == torch.float64), int(backward))
