"""One chunk of one layer of a bank: solve, read, advance; through torch, or compiled where that is possible."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from nestling.ops import native
from nestling.ops.chunk_rule import Decay, Writes, chunk_advance, chunk_read, chunk_writes, decay_products


@dataclass(frozen=True)
class ChunkDecay:
    """What all layers of a bank share in a chunk: logarithms of a_t and b_t (both <= 0), and which tokens are there."""

    log_retention: Float[Tensor, "*batch C"]
    log_momentum: Float[Tensor, "*batch C"] | None = None
    valid: Bool[Tensor, "*#batch C"] | None = None

    @cached_property
    def products(self) -> Decay:
        """`decay_products` of the chunk, computed once for all layers."""
        return decay_products(self.log_retention, self.log_momentum, self.valid)


def chunk_step(
    x: Float[Tensor, "*stack C K"],
    g: Float[Tensor, "*stack C V"],
    inner_lr: Float[Tensor, "*batch C"],
    erase: Float[Tensor, "*batch C"] | None,
    decay: ChunkDecay,
    weight: Float[Tensor, "*stack V K"],
    surprise: Float[Tensor, "*stack V K"] | None = None,
    *,
    recalled: Float[Tensor, "*stack C V"] | None = None,
    q: Float[Tensor, "*batch C K"] | None = None,
    answers: int = 0,
    normalise: bool = False,
    read_before: bool = False,
    online: bool = False,
) -> tuple[Float[Tensor, "*batch C Q"] | None, Tensor, Tensor | None]:
    """Write a chunk into a memory, or into M that share their rates, and read the (first) one at q.

    Args:
        x: inputs of the weight; `stack` is `batch`, and M after it where there are M memories.
        g: gradients at its output; with `online` minus the targets.
        inner_lr: l_t; 0 at tokens that are not there.
        erase: e_t, or None for no erase; 0 at tokens that are not there.
        decay: of the chunk.
        weight: running fast weights before the chunk.
        surprise: momentum before the chunk; given exactly when `decay` has momentum.
        recalled: X W_0^T if it is at hand already.
        q: queries, or None for no read.
        answers: outputs that are read, from the first.
        normalise: divide l_t and e_t by max(1, |x_t|^2), which keeps the erase a contraction for inputs of any length.
        read_before: every token reads the weights before its own write.
        online: the gradient is W_{t-1} x_t + g_t, taken token by token.

    Returns:
        The answers (None without q), and weight and surprise after the chunk.
    """
    if online and decay.log_momentum is None:
        erase, online = inner_lr if erase is None else erase + inner_lr, False
    rates = (inner_lr, erase, decay.log_retention, decay.log_momentum, decay.valid)
    options = (answers, normalise, read_before, online)
    if native.fits(x, weight):
        return native.native_chunk(_plain, (x, g, *rates, weight, surprise, recalled, q), options)
    return _step(x, g, inner_lr, erase, decay, weight, surprise, recalled, q, *options)


def _plain(
    x: Tensor,
    g: Tensor,
    inner_lr: Tensor,
    erase: Tensor | None,
    log_retention: Tensor,
    log_momentum: Tensor | None,
    valid: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    return _step(x, g, inner_lr, erase, ChunkDecay(log_retention, log_momentum, valid), *rest)


def _step(
    x: Tensor,
    g: Tensor,
    inner_lr: Tensor,
    erase: Tensor | None,
    decay: ChunkDecay,
    weight: Tensor,
    surprise: Tensor | None,
    recalled: Tensor | None,
    q: Tensor | None,
    answers: int,
    normalise: bool,
    read_before: bool,
    online: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`chunk_step` out of torch's operations."""
    several = x.dim() > inner_lr.dim() + 1
    lr, e, shared = inner_lr, erase, decay.products
    if several:
        lr, e, shared = lr.unsqueeze(-2), None if e is None else e.unsqueeze(-2), shared.unsqueeze(-1)
    if normalise:
        power = x.square().sum(-1).clamp_min(1.0).reciprocal()
        lr, e = lr * power, None if e is None else e * power
    writes = chunk_writes(x, lr.unsqueeze(-1) * g, e, shared, weight, surprise, recalled, lr if online else None)
    y = None
    if q is not None:
        own, first, first_s = writes, weight, surprise
        if several:
            erased = None if writes.erased is None else writes.erased.select(-3, 0)
            own = Writes(x.select(-3, 0), writes.step.select(-3, 0), erased)
            first, first_s = weight.select(-3, 0), None if surprise is None else surprise.select(-3, 0)
        own = Writes(own.x, own.step[..., :answers], None if own.erased is None else own.erased[..., :answers])
        first, first_s = first[..., :answers, :], None if first_s is None else first_s[..., :answers, :]
        y = chunk_read(q, own, decay.products, first, first_s, read_before)
    return y, *chunk_advance(writes, shared, weight, surprise)
