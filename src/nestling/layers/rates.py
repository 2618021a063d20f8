"""Rates of memories that learn in context: a token's gates, brought into the stable range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from nestling.memory.lesson import Rates
from nestling.memory.rule import Rule
from nestling.ops import native
from nestling.ops.chunk_step import ChunkDecay
from nestling.ops.native import RateRule

Kind = Literal["online", "erase", "free", "dot", "split"]


@dataclass(frozen=True)
class Gates:
    """What the rates of a chunk come from.

    Attributes:
        eta: logit of the inner learning rate.
        alpha: logit of the retention, or None for none.
        log_momentum: log b_t, with online gradients log beta of b_t = a_t beta; None without momentum.
        valid: which tokens are there; None when all are.
    """

    eta: Float[Tensor, "N H L"]
    alpha: Float[Tensor, "N H L"] | None
    log_momentum: Float[Tensor, "N H L"] | None
    valid: Bool[Tensor, "N 1 L"] | None


@dataclass(frozen=True)
class Scales:
    """What the rates learn across sequences, one number a head (and layer).

    Attributes:
        eta_bias: `[H]`, added to the logits.
        alpha_bias: `[H]`, or None without retention.
        share: `[layers, H]` share of the erase that becomes the inner learning rate.
        hidden_erase: `[layers - 1, H]` share of the erase in the layers before the last, or None without erase or
            hidden layers.
        others: `[H]` share of the rates that the memories after a bank's first take, or None for all.
        gain: `[H]` of what these memories add to their base (`MemoryBank.whole`), or None for 1.
        value_length: `[H]` of the targets of M_memory, or None for 1.
    """

    eta_bias: Tensor
    alpha_bias: Tensor | None
    share: Tensor
    hidden_erase: Tensor | None
    others: Tensor | None = None
    gain: Tensor | None = None
    value_length: Tensor | None = None


def rate_rule(rule: Rule, max_erase: float, chunk: int, split: bool = False, stretch: float = 1.0) -> RateRule:
    """The formula a learning rule needs.

    Args:
        rule: of the memory.
        max_erase: largest (e_t + folded l_t) / a_t.
        chunk: the longest time, in tokens, a gradient is stale.
        split: the share is of the whole rate and not of the erase.
        stretch: of the sigmoid that gives the rate, about 1/2, cut at 0 and 1.
    """
    kind: Kind = "free" if rule.objective != "dot" else "dot"
    if rule.online:
        kind = "split" if split else "online"
    elif rule.erase:
        kind = "erase"
    return RateRule(kind, max_erase, 1.0 / chunk, online_only=not rule.erase, stretch=stretch)


def chunk_rates(rule: RateRule, gates: Gates, scales: Scales) -> Rates:
    """Rates of a chunk; tokens that are not there have e = l = 0.

    With k_t = a_t = sigmoid(alpha_t)^(1/16), eta_t = stretch (sigmoid(eta_t) - 1/2) + 1/2, cut at 0 and 1, and
    r_t = max_erase eta_t:

        "erase"    e_t = k_t r_t, l_t = share k_t min(r_t, 2 - r_t) (1 - b_t)
        "free"     e_t = 0, l_t = share eta_t max(floor, 1 - a_t) (1 - b_t)
        "dot"      e_t = 0, l_t = share eta_t (1 - b_t)
        "online"   e_t + l_t = k_t r_t, l_t = share e_t; or e_t = 0 with `online_only`
        "split"    e_t + l_t = k_t r_t, l_t = share k_t r_t

    Online gradients with momentum follow weights that the surprise still moves. With b_t = a_t beta,

        l_t is multiplied by (1 - beta)^2 / (1 + beta), and e_t by (1 - beta^2) / (1 + beta - beta^2)

    which for a beta that stays the same keeps every write a contraction (derived in `docs/paper_map.md`).

    Layers before the last take the share `hidden_erase` of e_t, in "split" of k_t r_t.

    Args:
        rule: which of these, and its constants.
        gates: of the chunk's tokens.
        scales: of the layer.
    """
    tensors = (
        gates.eta,
        gates.alpha,
        gates.log_momentum,
        gates.valid,
        scales.eta_bias,
        scales.alpha_bias,
        scales.share,
        scales.hidden_erase,
    )
    layers, log_b = scales.share.shape[0], gates.log_momentum
    follows = rule.kind in ("online", "split") and log_b is not None
    compiled = layers <= native.MAX_LAYERS and native.fits(gates.eta)
    made = native.native_rates(_plain, rule, tensors) if compiled else _plain(rule, *tensors)
    log_a, lr, erase = made[0], list(made[1 : 1 + layers]), list(made[1 + layers :])
    if follows and log_b is not None:
        log_b = log_b + log_a
    return Rates(erase or None, lr, ChunkDecay(log_a, log_b, gates.valid), scales.others)


def _plain(
    rule: RateRule,
    eta_logit: Tensor,
    alpha: Tensor | None,
    log_b: Tensor | None,
    valid: Tensor | None,
    eta_bias: Tensor,
    alpha_bias: Tensor | None,
    share: Tensor,
    hidden_erase: Tensor | None,
) -> tuple[Tensor, ...]:
    """log a, l of every layer, and e of every layer when the rule erases, out of torch's operations."""
    eta = torch.sigmoid(eta_logit + eta_bias[:, None])
    if rule.stretch != 1:
        eta = (rule.stretch * (eta - 0.5) + 0.5).clamp(0, 1)
    if valid is not None:
        eta = eta * valid
    log_a = None
    if alpha is not None and alpha_bias is not None:
        log_a = F.logsigmoid(alpha + alpha_bias[:, None]) / 16
    keep = 1.0 if log_a is None else log_a.exp()
    shares = list(share[:, :, None])
    full = rule.max_erase * eta
    erase = None
    if rule.kind == "online":
        rate = full * keep
        if rule.online_only:
            shares[-1] = torch.ones_like(shares[-1])
        else:
            erase = rate = rate / (1 + shares[-1])
    elif rule.kind == "split":
        rate = full * keep
        erase = rate * (1 - shares[-1])
    elif rule.kind == "erase":
        erase, rate = keep * full, keep * torch.minimum(full, 2 - full)
    elif rule.kind == "free":
        rate = eta * (rule.floor if log_a is None else (-torch.expm1(log_a)).clamp_min(rule.floor))
    else:
        rate = eta
    whole = rate
    if log_b is not None:
        less = -torch.expm1(log_b)
        if rule.kind in ("online", "split"):
            beta = log_b.exp()
            rate = rate * less * less / (1 + beta)
            of_erase = less * (1 + beta) / (1 + beta * less)
            erase, whole = None if erase is None else erase * of_erase, whole * of_erase
        else:
            rate = rate * less
    log_a = torch.zeros_like(eta) if log_a is None else log_a
    erases = []
    if erase is not None:
        hidden = [] if hidden_erase is None else list(hidden_erase[:, :, None])
        of_hidden = whole if rule.kind == "split" else erase
        erases = [*(of_hidden * s for s in hidden), erase]
    return (log_a, *(rate * s for s in shares), *erases)
