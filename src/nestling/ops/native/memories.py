"""Compiled reads and inner gradients of a bank of MLP memories, as autograd functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.ops.native.arguments import constant
from nestling.ops.native.build import call, expect
from nestling.ops.native.second_order import through_torch

MAX_LAYERS = constant("most_layers")
MAX_INPUTS = constant("most_inputs")


@dataclass(frozen=True)
class BankShape:
    """What a bank of MLP memories is, and how its inner gradient is taken.

    Attributes:
        memories: M.
        gates: G.
        hidden: width of hidden layers.
        activation: one of Activation in C++.
        self_targets: targets are M_m(v), else v.
        dot: objective is the dot product, else L2.
        clip: bound on every coordinate of a gradient.
        first: memory from which a read starts.
    """

    memories: int
    gates: int
    hidden: int
    activation: str
    self_targets: bool = True
    dot: bool = False
    clip: float = 1.0
    first: int = 0

    def numbers(self, x: Tensor, layers: int) -> dict[str, Any]:
        """The fields of BankArguments but the weights."""
        problems, chunk, width = x.flatten(0, -3).shape
        sizes = {"problems": problems, "C": chunk, "K": width, "layers": layers, "padding": 0, "apart": 0}
        unused = {"online": False, "base": None, "own": (), "length": None}
        return asdict(self) | sizes | unused | {"threads": torch.get_num_threads()}

    def check(self, weights: Sequence[Tensor], *inputs: Tensor) -> None:
        """Refuse weights and inputs that do not belong to this bank.

        Raises:
            ValueError: what, its shape, and the shape it must have.
        """
        x = inputs[0]
        *batch, _, width = x.shape
        for other in inputs[1:]:
            expect("an input", other, x, *x.shape)
        expect("a first weight", weights[0], x, *batch, self.memories * self.hidden + self.gates, width)
        for weight, out in zip(weights[1:], self.widths(width, len(weights))[1:], strict=True):
            expect("a weight", weight, x, *batch, self.memories, out, self.hidden)

    def widths(self, width: int, layers: int) -> list[int]:
        """Outputs of each layer."""
        return [self.hidden] * (layers - 1) + [width]


Plain = Callable[..., Sequence[Tensor | None]]


def native_read(
    plain: Plain, shape: BankShape, inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Outputs `[..., M - first, C, K]` and gates `[..., C, G]` (None without gates).

    Args:
        plain: the same out of torch's operations, with the inputs and the weights as arguments.
        shape: of the bank.
        inputs: `[..., C, K]` for each of these memories, and one for the gates if there are any.
        weights: `[..., M * hidden + G, K]`, then `[..., M, out, hidden]`.
    """
    values, gates = _Read.apply(plain, shape, len(inputs), *inputs, *weights)  # type: ignore[no-untyped-call]
    return values, gates


def _places(shape: BankShape, inputs: Sequence[Any]) -> list[Any]:
    """Inputs in the places C++ has for them: the gates' is the last."""
    deep = list(inputs[: shape.memories - shape.first])
    gates = inputs[-1] if shape.gates else None
    return [*deep, *[None] * (MAX_INPUTS - 1 - len(deep)), gates]


def native_inner(
    plain: Plain, shape: BankShape, key: Tensor, value: Tensor, weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs of the layers after the first, and every layer's products W x and gradients, as `Trace` lays them out.

    Args:
        plain: the same out of torch's operations, with key, value and the weights as arguments.
        shape: of the bank.
        key: `[..., C, K]`.
        value: `[..., C, K]`.
        weights: `[..., M * hidden + G, K]`, then `[..., M, out, hidden]`.
    """
    layers = len(weights)
    found = _Inner.apply(plain, shape, key, value, *weights)  # type: ignore[no-untyped-call]
    return list(found[: layers - 1]), list(found[layers - 1 : 2 * layers - 1]), list(found[2 * layers - 1 :])


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plain: Plain, shape: BankShape, reads: int, *given: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs, weights = ([t.contiguous() for t in part] for part in (given[:reads], given[reads:]))
        shape.check(weights, *inputs)
        x, layers = inputs[0], len(weights)
        *batch, chunk, width = x.shape
        count = shape.memories - shape.first
        z = [x.new_empty(*batch, count, chunk, out) for out in shape.widths(width, layers)]
        values = x.new_empty(*batch, count, chunk, width)
        gates = x.new_empty(*batch, chunk, shape.gates) if shape.gates else None
        ctx.numbers, ctx.shape, ctx.reads, ctx.layers = shape.numbers(x, layers), shape, reads, layers
        read = {"x": _places(shape, inputs), "values": values, "gate_values": gates, "z": z}
        call("read", x.dtype, False, ctx.numbers | {"W": weights}, read)
        ctx.save_for_backward(*given, *z)
        ctx.plain = plain
        ctx.set_materialize_grads(False)
        return values, gates

    @staticmethod
    def backward(ctx: Any, d_values: Tensor | None, d_gates: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        given, z = saved[: -ctx.layers], saved[-ctx.layers :]
        if torch.is_grad_enabled():
            return None, None, None, *through_torch(ctx.plain, given, (d_values, d_gates))
        inputs, weights = ([t.contiguous() for t in part] for part in (given[: ctx.reads], given[ctx.reads :]))
        d_weights = [torch.zeros_like(w) for w in weights]
        d_inputs = [torch.empty_like(t) for t in inputs]
        d_values, d_gates = (None if t is None else t.contiguous() for t in (d_values, d_gates))
        read = {"x": _places(ctx.shape, inputs), "values": None, "gate_values": None, "z": z}
        read |= {"dvalues": d_values, "dgates": d_gates, "dx": _places(ctx.shape, d_inputs)}
        bank = ctx.numbers | {"W": weights, "dW": d_weights, "dbase": None, "d_own": (), "d_length": None}
        call("read", inputs[0].dtype, True, bank, read)
        return None, None, None, *d_inputs, *d_weights


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plain: Plain, shape: BankShape, key: Tensor, value: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        given = (*weights, key, value)
        shape.check(weights, key, value)
        key, value, *weights = (t.contiguous() for t in (key, value, *weights))  # type: ignore[assignment]
        *batch, chunk, width = key.shape
        layers = len(weights)
        widths = shape.widths(width, layers)
        each = [key.new_empty(*batch, shape.memories, chunk, out) for out in widths]
        stacked = key.new_empty(*batch, chunk, weights[0].shape[-2])
        hidden = [torch.empty_like(each[0]) for _ in range(layers - 1)]
        recalled, gradients = ([torch.empty_like(t) for t in (stacked, *each[1:])] for _ in range(2))
        ctx.numbers, ctx.layers = shape.numbers(key, layers), layers
        outputs = {"H": [None, *hidden], "recalled": recalled, "g": gradients, "zv": each}
        call("lesson", key.dtype, False, ctx.numbers | {"W": weights}, {"key": key, "value": value, **outputs})
        ctx.plain = plain
        ctx.save_for_backward(*given, *recalled, *gradients, *each[:-1])
        ctx.set_materialize_grads(False)
        return *hidden, *recalled, *gradients

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, layers = ctx.saved_tensors, ctx.layers
        weights, inputs, kept = saved[:layers], saved[layers : layers + 2], saved[layers + 2 :]
        if torch.is_grad_enabled():
            return None, None, *through_torch(ctx.plain, (*inputs, *weights), upstream)
        weights, inputs = ([t.contiguous() for t in part] for part in (weights, inputs))
        d_weights = [torch.zeros_like(w) for w in weights]
        d_inputs = [torch.empty_like(t) for t in inputs]
        coming = [None if t is None else t.contiguous() for t in upstream]
        # What is not read again: the hidden activations, and the values' outputs.
        lesson = {"key": inputs[0], "value": inputs[1], "dkey": d_inputs[0], "dvalue": d_inputs[1], "H": ()}
        lesson |= {"recalled": kept[:layers], "g": kept[layers : 2 * layers], "zv": kept[2 * layers :]}
        lesson |= {"dH": [None, *coming[: layers - 1]], "drecalled": coming[layers - 1 : 2 * layers - 1]}
        lesson |= {"dg": coming[2 * layers - 1 :]}
        bank = ctx.numbers | {"W": weights, "dW": d_weights, "dbase": None, "d_own": (), "d_length": None}
        call("lesson", weights[0].dtype, True, bank, lesson)
        return None, None, *d_inputs, *d_weights
