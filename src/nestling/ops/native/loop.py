"""The compiled loop over the chunks of a bank that generates what it learns from, as an autograd function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.ops.native.build import call, call_packed, expect, kernel, structures
from nestling.ops.native.mappings import block
from nestling.ops.native.memories import BankShape
from nestling.ops.native.rates import RateRule
from nestling.ops.native.second_order import through_torch

VECTORS, GATES = ("k", "v", "q"), ("eta", "alpha")
INPUTS = ("u_k", "u_v", "u_q", "u_gates")
TOKENS = (*INPUTS, *VECTORS, *GATES, "log_b")
SCALES = ("eta_bias", "alpha_bias", "share", "hidden_erase", "others", "gain", "value_length")
AFTER = ("last", "last_surprise", "last_start")


@dataclass(frozen=True)
class LoopShape:
    """What the loop runs.

    Attributes:
        bank: of the memories.
        rates: formula of the rates.
        chunk: tokens in a chunk.
        first: tokens of the first chunk, which an earlier call may have begun.
        answers: the first memory answers the queries; without it, what the memories make is the result.
        deep: what the other memories make: "k", "v", "q".
        gates: what the gates make: "eta", "alpha".
        online: gradients of the last layer are those of the token before.
        momentum: whether there is a surprise.
        read_before: tokens read the weights before their own write.
    """

    bank: BankShape
    rates: RateRule
    chunk: int
    first: int
    answers: bool
    deep: tuple[str, ...]
    gates: tuple[str, ...]
    online: bool
    momentum: bool
    read_before: bool

    @property
    def made(self) -> dict[str, int]:
        """Where each of k, v, q, eta and alpha comes from, by its role; -1 is given."""
        where = {n: self.deep.index(n) if n in self.deep else -1 for n in VECTORS}
        return _roles(where | {n: self.gates.index(n) if n in self.gates else -1 for n in GATES})

    def numbers(self, given: LoopTensors, keep: bool) -> dict[str, Any]:
        """Every field of LoopArguments that is no tensor; `keep`: a backward pass will come."""
        rows, heads, tokens, width = given.like.shape
        bank, rates = self.bank, self.rates
        return {
            "problems": rows * heads,
            "heads": heads,
            "tokens": tokens,
            "chunk": self.chunk,
            "first": self.first,
            "K": width,
            "hidden": bank.hidden,
            "layers": len(given.start),
            "memories": bank.memories,
            "gates": bank.gates,
            "activation": bank.activation,
            "self_targets": bank.self_targets,
            "dot": bank.dot,
            "clip": bank.clip,
            "kind": rates.kind,
            "online_only": rates.online_only,
            "max_erase": rates.max_erase,
            "floor": rates.floor,
            "stretch": rates.stretch,
            "online": self.online,
            "split": given.running[0] is not None,
            "momentum": self.momentum,
            "before": self.read_before,
            "made": self.made,
            "keep": keep,
            "answers": self.answers,
            "threads": torch.get_num_threads(),
        }


@dataclass(frozen=True)
class LoopTensors:
    """Arguments of the loop: N rows, H heads, T tokens, L layers.

    Attributes:
        tokens: for every name of `TOKENS` a tensor `[N, H, T, K]` (gates `[N, H, T]`), or None for what memories make.
        scales: bias of eta and of alpha `[H]`, share `[L, H]`, share of hidden layers `[L - 1, H]`, share of the
            memories after the first `[H]`, gain of what they add to their base `[H]`, and length of the first's targets
            `[H]`; or None.
        start: weights at the start of the first chunk, a layer each.
        running: weights before the first token where they are others, else Nones.
        surprise: a layer each, or Nones.
        base: `[H, ...]`, what the weights are the difference to, or Nones.
    """

    tokens: Sequence[Tensor | None]
    scales: Sequence[Tensor | None]
    start: Sequence[Tensor]
    running: Sequence[Tensor | None]
    surprise: Sequence[Tensor | None]
    base: Sequence[Tensor | None]

    @property
    def like(self) -> Tensor:
        """The first of the tokens' tensors, `[N, H, T, K]`."""
        return next(t for t in self.tokens if t is not None)

    @property
    def named(self) -> dict[str, Any]:
        """All as the fields of LoopArguments."""
        by_name = dict(zip(TOKENS, self.tokens, strict=True))
        scales = dict(zip(SCALES, self.scales, strict=True))
        k, v, q, gates = (by_name.pop(name) for name in INPUTS)
        u = _roles({"k": k, "v": v, "q": q, "eta": gates, "alpha": None})
        given = {"u": u, "log_b": by_name.pop("log_b"), "given": _roles(by_name), **scales}
        return given | {"start": self.start, "running": self.running, "surprise": self.surprise, "base": self.base}

    def flat(self) -> list[Any]:
        """All in a row, as autograd wants them."""
        return [*self.tokens, *self.scales, *self.start, *self.running, *self.surprise, *self.base]

    @staticmethod
    def of(flat: Sequence[Any]) -> LoopTensors:
        """The reverse of `flat`."""
        tokens, rest = flat[: len(TOKENS)], flat[len(TOKENS) :]
        scales, weights = rest[: len(SCALES)], rest[len(SCALES) :]
        layers = len(weights) // 4
        return LoopTensors(tokens, scales, *(weights[i : i + layers] for i in range(0, 4 * layers, layers)))


Plain = Callable[[LoopTensors], Sequence[Tensor | None]]


def native_loop(plain: Plain, shape: LoopShape, given: LoopTensors) -> tuple[Tensor, list[list[Any]]]:
    """The result; weights after the last token, surprises after it, and weights at the last chunk's start.

    The result is the answers `[N, H, T, K]`, or where no memory answers what the memories make, side by side. The last
    are Nones where that chunk is complete or began before the first token; surprises without momentum.

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
        like = given.like
        time, momentum = like.shape[2], shape.momentum
        partial = time > shape.first and (time - shape.first) % shape.chunk != 0
        results: dict[str, list[Tensor | None]] = {
            "last": [torch.empty_like(w) for w in given.start],
            "last_surprise": [torch.empty_like(w) if momentum else None for w in given.start],
            "last_start": [torch.empty_like(w) if partial else None for w in given.start],
        }
        width = like.shape[-1]
        y = like.new_empty(*like.shape[:3], width if shape.answers else len(shape.deep) * width + len(shape.gates))
        ctx.numbers = shape.numbers(given, keep)
        arguments = {**ctx.numbers, **given.named, **results, "y": y, "kept": None}
        (structure,) = structures("loop")
        packed = structure.pack(arguments, like.dtype, back=False)
        kept = block(int(kernel().nestling_loop_room(packed, int(like.dtype == torch.float64))), like)
        call_packed("loop", like.dtype, False, structure.replace(packed, "kept", kept))
        ctx.plain, ctx.shape = plain, shape
        if keep:
            ctx.save_for_backward(*flat, kept)
        ctx.set_materialize_grads(False)
        return y, *(t for group in results.values() for t in group)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        *flat, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = through_torch(lambda *t: ctx.plain(LoopTensors.of(t)), flat, upstream)
            return None, None, None, *again
        given = _checked(ctx.shape, LoopTensors.of(flat))
        layers = len(given.start)
        rows, heads = given.start[0].shape[:2]
        sizes = ((), (), (layers,), (layers - 1,), (), (), ())
        sums = [None if t is None else t.new_zeros(rows, heads, *of) for t, of in zip(given.scales, sizes, strict=True)]
        tokens, start, running, surprise = (
            [None if t is None else torch.empty_like(t) for t in group]
            for group in (given.tokens, given.start, given.running, given.surprise)
        )
        base = [None if t is None else t.new_empty(rows, *t.shape) for t in given.base]
        found = LoopTensors(tokens, sums, start, running, surprise, base)  # type: ignore[arg-type]
        dy, *last = [None if t is None else t.contiguous() for t in upstream]
        arriving = {f"d_{n}": last[i * layers : (i + 1) * layers] for i, n in enumerate(AFTER)}
        unread = {"y": None, **dict.fromkeys(AFTER, ())}
        arguments = {**ctx.numbers, **given.named, **unread, "kept": kept, "dy": dy, **arriving}
        arguments |= {f"d_{name}": tensors for name, tensors in found.named.items()}
        call("loop", kept.dtype, True, arguments)
        scales = [None if t is None else (t.sum(0).T if t.dim() == 3 else t.sum(0)) for t in sums]
        of_base = [None if t is None else t.sum(0) for t in base]
        return None, None, None, *tokens, *scales, *start, *running, *surprise, *of_base


def _roles(values: dict[str, Any]) -> dict[str, Any]:
    """The values under the names of `Role` in C++."""
    return {f"{name}_role": value for name, value in values.items()}


def _checked(shape: LoopShape, given: LoopTensors) -> LoopTensors:
    """Contiguous tensors, refused when compiled code would read beyond them."""
    made = LoopTensors.of([None if t is None else t.contiguous() for t in given.flat()])
    like = made.like
    rows, heads, time, width = like.shape
    layers = len(made.start)
    for name, tensor in zip(TOKENS, made.tokens, strict=True):
        expect(name, tensor, like, rows, heads, time, *((width,) if name in (*INPUTS, *VECTORS) else ()))
    eta_bias, alpha_bias, share, hidden, others, gain, length = made.scales
    for name, tensor in (("the bias of eta", eta_bias), ("the bias of alpha", alpha_bias)):
        expect(name, tensor, like, heads)
    expect("share", share, like, layers, heads)
    expect("the share of hidden layers", hidden, like, layers - 1, heads)
    expect("the share of the other memories", others, like, heads)
    expect("the gain of the other memories", gain, like, heads)
    expect("the length of values", length, like, heads)
    bank = shape.bank
    for anchor, start in zip(made.base, made.start, strict=True):
        expect("a first weight's base", anchor, like, *start.shape[1:])
    for group in (made.start, made.running, made.surprise):
        expect("a first weight", group[0], like, rows, heads, bank.memories * bank.hidden + bank.gates, width)
        for weight, out in zip(group[1:], bank.widths(width, layers)[1:], strict=True):
            expect("a weight", weight, like, rows, heads, bank.memories, out, bank.hidden)
    return made
