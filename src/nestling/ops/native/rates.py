"""Compiled rates of a chunk, as an autograd function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nestling.ops.native.build import call, expect
from nestling.ops.native.second_order import through_torch

# Fields of RatesArguments, in the order in which `native_rates` has the tensors.
INPUTS = ("eta", "alpha", "log_b", "valid", "eta_bias", "alpha_bias", "share", "hidden")


@dataclass(frozen=True)
class RateRule:
    """Which formula of `layers.rates.chunk_rates` holds, and its constants.

    Attributes:
        kind: of the formula, one of RateKind in C++.
        max_erase: largest (e_t + folded l_t) / a_t.
        floor: least share of a gradient step in "free", one over the chunk.
        stretch: of the sigmoid that gives the rate, about 1/2, cut at 0 and 1.
        online_only: "online" without an erase of its own.
    """

    kind: Literal["online", "erase", "free", "dot", "split"]
    max_erase: float
    floor: float
    online_only: bool = False
    stretch: float = 1.0

    @property
    def erases(self) -> bool:
        """Whether there is an e_t."""
        return self.kind in ("erase", "split") or (self.kind == "online" and not self.online_only)


def native_rates(
    plain: Callable[..., tuple[Tensor, ...]], rule: RateRule, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """log a, l of every layer, e of every layer (where there is one).

    Args:
        plain: the same out of torch's operations, with the rule and the tensors as arguments.
        rule: of the rates.
        tensors: eta, alpha, log b `[N, H, L]`, valid `[N, 1, L]`, two biases `[H]`, share `[layers, H]`, hidden
            `[layers - 1, H]`; the optional ones may be None.
    """
    found: tuple[Tensor, ...] = _Rates.apply(plain, rule, *tensors)  # type: ignore[no-untyped-call]
    return found


class _Rates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plain: Any, rule: RateRule, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs = _checked(tensors)
        eta, share = inputs[0], inputs[6]
        layers = share.shape[0]
        outputs = [torch.empty_like(eta) for _ in range(1 + layers * (2 if rule.erases else 1))]
        _call(rule, inputs, _outputs("", outputs, layers))
        ctx.save_for_backward(*tensors)
        ctx.plain, ctx.rule, ctx.count = plain, rule, len(outputs)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return None, *through_torch(ctx.plain, (ctx.rule, *ctx.saved_tensors), upstream)
        inputs = _checked(ctx.saved_tensors)
        sums = [None if t is None else torch.zeros_like(t) for t in inputs[4:]]
        per_token = [None if t is None else torch.empty_like(t) for t in inputs[:3]]
        coming = [None if t is None else t.contiguous() for t in upstream]
        layers = len(inputs[6])
        gradients = dict(zip((f"d_{n}" for n in INPUTS if n != "valid"), (*per_token, *sums), strict=True))
        others = _outputs("", [None] * ctx.count, layers) | _outputs("d_", coming, layers) | gradients
        _call(ctx.rule, inputs, others, back=True)
        return None, None, *per_token, None, *sums


def _checked(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Contiguous inputs, refused when compiled code would read beyond them."""
    made: list[Any] = [None if t is None else t.contiguous() for t in tensors]
    eta, alpha, log_b, valid, eta_bias, alpha_bias, share, hidden = made
    rows, heads, tokens = eta.shape
    for name, tensor in (("alpha", alpha), ("log b", log_b)):
        expect(name, tensor, eta, rows, heads, tokens)
    for name, tensor in (("the bias of eta", eta_bias), ("the bias of alpha", alpha_bias)):
        expect(name, tensor, eta, heads)
    expect("share", share, eta, len(share), heads)
    expect("the share of hidden layers", hidden, eta, len(share) - 1, heads)
    if valid is not None and (valid.shape != (rows, 1, tokens) or valid.dtype != torch.bool):
        found = f"{tuple(valid.shape)} of {valid.dtype}"
        raise ValueError(f"valid is {found}, but must be {(rows, 1, tokens)} of torch.bool")
    return made


def _outputs(of: str, tensors: Sequence[Tensor | None], layers: int) -> dict[str, Any]:
    """log a, l and e, or with `of` their gradients, by name."""
    return {f"{of}log_a": tensors[0], f"{of}lr": tensors[1 : 1 + layers], f"{of}e": tensors[1 + layers :]}


def _call(rule: RateRule, inputs: list[Any], others: dict[str, Any], back: bool = False) -> None:
    eta, share = inputs[0], inputs[6]
    rows, heads, tokens = eta.shape
    numbers = {"rows": rows, "heads": heads, "tokens": tokens, "layers": len(share)}
    formula = {f: getattr(rule, f) for f in ("kind", "max_erase", "floor", "online_only", "stretch")}
    call("rates", eta.dtype, back, numbers | formula | dict(zip(INPUTS, inputs, strict=True)) | others)
