"""The compiled loop over the chunks of a bank that generates what it learns from, as an autograd function."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.ops.native.build import expect, kernel, pointers, sizes
from nestling.ops.native.mappings import block
from nestling.ops.native.memories import ACTIVATIONS, BankShape
from nestling.ops.native.rates import KINDS, RateRule
from nestling.ops.native.second_order import through_torch

VECTORS, GATES = ("k", "v", "q"), ("eta", "alpha")
TOKENS = ("u", *VECTORS, *GATES, "log_b")


@dataclass(frozen=True)
class LoopShape:
    """What the loop runs.

    Attributes:
        bank: of the memories.
        rates: formula of the rates.
        chunk: tokens in a chunk.
        first: tokens of the first chunk, which an earlier call may have begun.
        deep: what memories after the first make: "k", "v", "q".
        gates: what the gates make: "eta", "alpha".
        fold: l joins the erase (online gradients of matrices).
        momentum: whether there is a surprise.
        read_before: tokens read the weights before their own write.
    """

    bank: BankShape
    rates: RateRule
    chunk: int
    first: int
    deep: tuple[str, ...]
    gates: tuple[str, ...]
    fold: bool
    momentum: bool
    read_before: bool

    @property
    def made(self) -> list[int]:
        """Where each of k, v, q, eta and alpha comes from; -1 is given."""
        where = [self.deep.index(n) if n in self.deep else -1 for n in VECTORS]
        return where + [self.gates.index(n) if n in self.gates else -1 for n in GATES]


@dataclass(frozen=True)
class LoopTensors:
    """Arguments of the loop: N rows, H heads, T tokens, L layers.

    Attributes:
        tokens: for every name of `TOKENS` a tensor `[N, H, T, K]` (gates `[N, H, T]`), or None for what memories make.
        scales: bias of eta and of alpha `[H]`, share `[L, H]`, share of hidden layers `[L - 1, H]`; or None.
        start: weights at the start of the first chunk, a layer each.
        running: weights before the first token where they are others, else Nones.
        surprise: a layer each, or Nones.
    """

    tokens: Sequence[Tensor | None]
    scales: Sequence[Tensor | None]
    start: Sequence[Tensor]
    running: Sequence[Tensor | None]
    surprise: Sequence[Tensor | None]

    def flat(self) -> list[Any]:
        """All in the kernel's order."""
        return [*self.tokens, *self.scales, *self.start, *self.running, *self.surprise]

    @staticmethod
    def of(flat: Sequence[Any]) -> LoopTensors:
        """The reverse of `flat`."""
        tokens, scales, weights = flat[:7], flat[7:11], flat[11:]
        layers = len(weights) // 3
        return LoopTensors(tokens, scales, weights[:layers], weights[layers : 2 * layers], weights[2 * layers :])


Plain = Callable[[LoopTensors], Sequence[Tensor | None]]


def native_loop(plain: Plain, shape: LoopShape, given: LoopTensors) -> tuple[Tensor, list[list[Any]]]:
    """Answers `[N, H, T, K]`; weights after the last token, surprises after it, and weights at the last chunk's start.

    The last are Nones where that chunk is complete or began before the first token; surprises without momentum.

    Args:
        plain: the same out of torch's operations: the answers, then all layers of each of the three.
        shape: what the loop runs.
        given: its arguments.
    """
    flat = given.flat()
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat)
    y, *found = _Loop.apply(plain, shape, keep, *flat)  # type: ignore[no-untyped-call]
    layers = len(given.start)
    return y, [list(found[i : i + layers]) for i in range(0, 3 * layers, layers)]


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plain: Plain, shape: LoopShape, keep: bool, *flat: Any) -> tuple[Tensor | None, ...]:
        given = _checked(shape, LoopTensors.of(flat))
        q = next(t for t in given.tokens if t is not None)
        rows, heads, time, width = q.shape
        layers = len(given.start)
        split, momentum = given.running[0] is not None, shape.momentum
        bank, kind = shape.bank, KINDS.index(shape.rates.kind)
        ctx.numbers = [rows * heads, heads, time, shape.chunk, shape.first, width, bank.hidden, layers, bank.memories,
                       bank.gates, ACTIVATIONS.index(bank.activation), bank.self_targets, bank.dot, shape.fold, split,
                       momentum, shape.read_before, keep, kind, shape.rates.online_only, torch.get_num_threads(),
                       *shape.made]  # fmt: skip
        ctx.constants = (ctypes.c_double * 3)(bank.clip, shape.rates.max_erase, shape.rates.floor)
        double = int(q.dtype == torch.float64)
        kept = block(kernel().nestling_loop_room(sizes(*ctx.numbers), double), q)
        partial = time > shape.first and (time - shape.first) % shape.chunk != 0
        results = [
            *(torch.empty_like(w) for w in given.start),
            *(torch.empty_like(w) if momentum else None for w in given.start),
            *(torch.empty_like(w) if partial else None for w in given.start),
        ]
        y = q.new_empty(rows, heads, time, width)
        _call(ctx, [*given.flat(), y, *results, kept], q.dtype, back=False)
        ctx.plain, ctx.shape = plain, shape
        if keep:
            ctx.save_for_backward(*flat, kept)
        ctx.set_materialize_grads(False)
        return y, *results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        *flat, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = through_torch(lambda *t: ctx.plain(LoopTensors.of(t)), flat, upstream)
            return None, None, None, *found
        given = _checked(ctx.shape, LoopTensors.of(flat))
        layers = len(given.start)
        rows, heads = given.start[0].shape[:2]
        tokens = [None if t is None else torch.empty_like(t) for t in given.tokens]
        eta_bias, alpha_bias, share, hidden = given.scales
        sums = [
            None if t is None else t.new_zeros(rows, heads, *of)
            for t, of in ((eta_bias, ()), (alpha_bias, ()), (share, (layers,)), (hidden, (layers - 1,)))
        ]
        weights = [None if t is None else torch.empty_like(t) for t in (*given.start, *given.running, *given.surprise)]
        coming = [None if t is None else t.contiguous() for t in upstream]
        unread = [None] * (1 + 3 * layers)  # y and the last weights
        tensors = [*given.flat(), *unread, kept, *coming, *tokens, *sums, *weights]
        _call(ctx, tensors, kept.dtype, back=True)
        scales = [None if t is None else (t.sum(0).T if t.dim() == 3 else t.sum(0)) for t in sums]
        return None, None, None, *tokens, *scales, *weights


def _checked(shape: LoopShape, given: LoopTensors) -> LoopTensors:
    """Contiguous tensors, refused when compiled code would read beyond them."""
    made = LoopTensors.of([None if t is None else t.contiguous() for t in given.flat()])
    like = next(t for t in made.tokens if t is not None)
    rows, heads, time, width = like.shape
    layers = len(made.start)
    for name, tensor in zip(TOKENS, made.tokens, strict=True):
        expect(name, tensor, like, rows, heads, time, *((width,) if name in ("u", *VECTORS) else ()))
    eta_bias, alpha_bias, share, hidden = made.scales
    for name, tensor in (("the bias of eta", eta_bias), ("the bias of alpha", alpha_bias)):
        expect(name, tensor, like, heads)
    expect("share", share, like, layers, heads)
    expect("the share of hidden layers", hidden, like, layers - 1, heads)
    bank = shape.bank
    for group in (made.start, made.running, made.surprise):
        expect("a first weight", group[0], like, rows, heads, bank.memories * bank.hidden + bank.gates, width)
        for weight, out in zip(group[1:], bank.widths(width, layers)[1:], strict=True):
            expect("a weight", weight, like, rows, heads, bank.memories, out, bank.hidden)
    return made


def _call(ctx: Any, tensors: Sequence[Tensor | None], dtype: torch.dtype, back: bool) -> None:
    double = int(dtype == torch.float64)
    kernel().nestling_loop(sizes(*ctx.numbers), ctx.constants, pointers(tensors), double, int(back))
