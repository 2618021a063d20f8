"""The compiled chunk as an autograd function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.ops.native.build import call, expect
from nestling.ops.native.second_order import through_torch

# Fields of ChunkArguments, in the order in which `native_chunk` has the tensors.
INPUTS = ("x", "g", "lr", "erase", "log_a", "log_b", "valid", "W", "S", "recalled", "q")
RESULTS = ("y", "W2", "S2", "kept")
GRADIENTS = tuple(f"d{name}" for name in INPUTS if name != "valid")

Result = tuple[Tensor | None, Tensor, Tensor | None]


def native_chunk(
    plain: Callable[..., Result], tensors: Sequence[Tensor | None], options: tuple[int, bool, bool, bool]
) -> Result:
    """`ops.chunk_step.chunk_step`.

    Args:
        plain: the same out of torch's operations, with the tensors and then the options as arguments.
        tensors: x, g, l, e, log a, log b, valid, weight, surprise, X W_0^T, q.
        options: answers, normalise, read_before, online.
    """
    found: Result = _Chunk.apply(plain, *tensors, options)  # type: ignore[no-untyped-call]
    return found


class _Chunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Result:
        options: tuple[int, bool, bool, bool]
        plain, *tensors, options = arguments
        batch = tensors[2].shape[:-1]
        inputs: list[Any] = [None if t is None else _whole(t, batch) for t in tensors]
        x, g, *_, weight, surprise, _, q = inputs
        stack = x.shape[len(batch) : -2]
        memories = stack.numel()
        _check(inputs, batch, stack, options[0])
        answers, normalise, before, online = options
        numbers = {
            "problems": batch.numel(),
            "memories": memories,
            "C": x.shape[-2],
            "K": x.shape[-1],
            "V": g.shape[-1],
            "Q": answers,
            "normalise": normalise,
            "before": before,
            "online": online,
            "threads": torch.get_num_threads(),
        }

        read: Any = None if q is None else x.new_empty(*batch, x.shape[-2], options[0])
        results: list[Any] = [read, torch.empty_like(weight), None if surprise is None else torch.empty_like(surprise)]
        kept = torch.empty_like(g)
        made = dict(zip(RESULTS, (*results, kept), strict=True))
        call("chunk", weight.dtype, False, numbers | dict(zip(INPUTS, inputs, strict=True)) | made)
        ctx.save_for_backward(*tensors, kept)
        ctx.numbers, ctx.plain, ctx.options = numbers, plain, options
        ctx.set_materialize_grads(False)
        return results[0], results[1], results[2]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        tensors, kept = saved[:11], saved[11]
        if torch.is_grad_enabled():
            return None, *through_torch(ctx.plain, (*tensors, *ctx.options), upstream)[:11], None
        batch = tensors[2].shape[:-1]
        inputs: list[Any] = [None if t is None else _whole(t, batch) for t in tensors]
        x, g, lr, erase, log_a, log_b, _, weight, surprise, recalled, q = inputs
        memories = ctx.numbers["memories"]
        per_memory = (*lr.shape[:-1], memories, lr.shape[-1]) if memories != 1 else lr.shape
        found = [
            torch.empty_like(x),
            torch.empty_like(g),
            *(None if r is None else r.new_empty(per_memory) for r in (lr, erase, log_a, log_b)),
            torch.empty_like(weight),
            *(None if t is None else torch.empty_like(t) for t in (surprise, recalled)),
            None if q is None else (torch.empty_like(q) if upstream[0] is not None else torch.zeros_like(q)),
        ]
        coming = [None if t is None else t.contiguous() for t in upstream]
        # Nothing reads the results again.
        arguments = ctx.numbers | dict(zip(INPUTS, inputs, strict=True)) | dict.fromkeys(RESULTS) | {"kept": kept}
        arguments |= dict(zip(("dy", "dW2", "dS2"), coming, strict=True)) | dict(zip(GRADIENTS, found, strict=True))
        call("chunk", weight.dtype, True, arguments)
        dx, dg, *rates, d_weight, d_surprise, d_recalled, dq = found
        if memories != 1:
            rates = [None if r is None else r.sum(-2) for r in rates]
        return None, dx, dg, *rates, None, d_weight, d_surprise, d_recalled, dq, None


def _check(inputs: list[Any], batch: torch.Size, stack: torch.Size, answers: int) -> None:
    x, g, *rates, valid, weight, surprise, recalled, q = inputs
    tokens, width, out = x.shape[-2], x.shape[-1], g.shape[-1]
    for name, tensor in (("g", g), ("recalled", recalled)):
        expect(name, tensor, x, *batch, *stack, tokens, out)
    for name, tensor in (("weight", weight), ("surprise", surprise)):
        expect(name, tensor, x, *batch, *stack, out, width)
    for rate in rates:
        expect("a rate", rate, x, *batch, tokens)
    expect("q", q, x, *batch, tokens, width)
    if valid is not None and valid.shape != (*batch, tokens):
        raise ValueError(f"valid is {tuple(valid.shape)}, but must be {(*batch, tokens)}")
    if q is not None and not 0 <= answers <= out:
        raise ValueError(f"answers is {answers}, but the memory has {out} outputs")


def _whole(t: Tensor, batch: torch.Size) -> Tensor:
    """Contiguous, and repeated over batch dimensions that are 1 (`valid`, which every head shares)."""
    if t.shape[: len(batch)] != batch:
        t = t.expand(*batch, *t.shape[len(batch) :])
    return t.contiguous()
