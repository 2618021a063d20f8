"""The rule with a retention for every channel of the key and an erase with keys of its own, in closed form.

    W_t = W_{t-1} (diag(a_t) - e_t b_t c_t^T) + l_t v_t k_t^T,    y_t = W_t q_t

Equal retentions and b = c = k give the rule of `chunk_rule` without momentum. Below, e is part of b and l of v. One
chunk of C tokens; L_t = log a_1 + ... + log a_t by channel; rows of U are u_t = W_{t-1} b_t, rows of V are v_t:

    M_qk[t, s] = sum_i q_t[i] k_s[i] exp(L_t[i] - L_s[i])           for s <= t, M_qc likewise
    M_bk[t, s] = sum_i b_t[i] k_s[i] exp(L_{t-1}[i] - L_s[i])       for s < t, M_bc likewise
    (I + M_bc) U = B W_0^T + M_bk V                                 B[t] = b_t exp(L_{t-1})
    y_t = W_0 (q_t exp(L_t)) + (M_qk V - M_qc U)[t]
    W_C = W_0 diag(exp(L_C)) + sum_s (v_s k_s^T - u_s c_s^T) diag(exp(L_C - L_s))

With a retention by channel M is not a Gram matrix times a decay, and exp(-L_s) overflows. So M is put together from
halves (`decayed_products`): between the tokens of two neighbouring blocks every exponent goes by the border of the
two, exp(L_t - L_border) exp(L_border - L_s), and neither is ever positive, however fast a channel forgets. Where the
retention has a floor, blocks begin as long as it allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nestling.ops import native
from nestling.ops.chunk_rule import solve_unit_lower

BOUND = 1e15
"""Largest entry of the fast weights where a chunk begins. With c apart from b a token's factor of W need not be a
contraction: for |b| = 1 and c = s b with s in (0, 1) by channel, its norm can reach 2 / sqrt(3). So there are tokens
that let the weights grow without end."""


MAX_EXPONENT = 80.0
"""Longest fall of the log decay within a first block: e^40 from its middle to either end, whose square is finite in
float32. Taken apart there and multiplied again, a decay is as exact as one that never left 1."""


@dataclass(frozen=True)
class _Tokens:
    """Tokens `[..., T, D]`, or by chunk `[..., chunks, C, D]`, with e in b and l in v; b and c may be None."""

    k: Tensor
    v: Tensor
    q: Tensor
    log_a: Tensor
    b: Tensor | None
    c: Tensor | None

    def fold(self, size: int) -> _Tokens:
        """By chunk of `size`, with zeros, which change nothing, after the last."""

        def rows(t: Tensor) -> Tensor:
            return F.pad(t, (0, 0, 0, -t.shape[-2] % size)).unflatten(-2, (-1, size))

        b, c = (None if t is None else rows(t) for t in (self.b, self.c))
        return _Tokens(rows(self.k), rows(self.v), rows(self.q), rows(self.log_a), b, c)


@dataclass(frozen=True)
class _Solved:
    """What chunks make of their first weights W_0: y_t = W_0 read_t + own_t and W_C = W_0 kept + added.

    Attributes:
        read: `[..., C, K]`.
        own: `[..., C, V]`.
        kept: `[..., K, K]`.
        added: `[..., V, K]`.
    """

    read: Tensor
    own: Tensor
    kept: Tensor
    added: Tensor


def diagonal_scan(
    k: Float[Tensor, "*batch T K"],
    v: Float[Tensor, "*batch T V"],
    q: Float[Tensor, "*batch T K"],
    *,
    weight: Float[Tensor, "*batch V K"],
    chunk_size: int,
    log_retention: Float[Tensor, "*batch T K"],
    recall_key: Float[Tensor, "*batch T K"] | None = None,
    erase_key: Float[Tensor, "*batch T K"] | None = None,
    erase: Float[Tensor, "*batch T"] | None = None,
    inner_lr: Float[Tensor, "*batch T"] | None = None,
    min_log_retention: float = -math.inf,
) -> tuple[Float[Tensor, "*batch T V"], Float[Tensor, "*batch V K"]]:
    """The rule above over a whole sequence: all chunks are solved at once, and one product a chunk chains them.

    On a CPU compiled code takes token after token instead, the weights in a core's cache.

    Arguments and results as `ops.reference.token_diagonal_rule`, with the logarithm of a (<= 0). Tokens with
    l = e = log a = 0 leave the weights as they are. Entries of the weights count as at most +-`BOUND` where a chunk
    begins.

    Args:
        k: keys of the write.
        v: values.
        q: queries.
        weight: W_0.
        chunk_size: tokens in a chunk, rounded up to a power of two. It changes speed and rounding, not the result.
        log_retention: log a_t.
        recall_key: b_t; None erases nothing.
        erase_key: c_t; None is k_t, which costs half.
        erase: e_t; None is 1.
        inner_lr: l_t; None is 1.
        min_log_retention: what no entry of `log_retention` is below. The nearer to 0, the fewer steps a chunk takes.

    Raises:
        ValueError: a chunk below 1, or an erase without `recall_key`.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    if recall_key is None and (erase is not None or erase_key is not None):
        raise ValueError("an erase needs recall_key, at which the memory is asked for what is to be erased")
    time = k.shape[-2]
    if not time:
        return torch.zeros_like(v), weight
    size = 1 << (min(chunk_size, time) - 1).bit_length()
    if erase is not None and recall_key is not None:
        recall_key = erase[..., None] * recall_key
    v = v if inner_lr is None else inner_lr[..., None] * v

    def plain(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return _scan(_Tokens(*tensors[:6]), tensors[6], size, min_log_retention)  # type: ignore[arg-type]

    tensors = (k, v, q, log_retention, recall_key, erase_key, weight)
    if native.fits(k[..., :1, :], weight):
        return native.native_diagonal(plain, tensors, size, BOUND)
    return plain(*tensors)


def _scan(tokens: _Tokens, weight: Tensor, size: int, floor: float) -> tuple[Tensor, Tensor]:
    """`diagonal_scan` out of torch's operations."""
    solved = _solve(tokens.fold(size), floor)
    starts = []
    for kept, added in zip(solved.kept.unbind(-3), solved.added.unbind(-3), strict=True):
        starts.append(weight.clamp(-BOUND, BOUND))
        weight = starts[-1] @ kept + added
    y = solved.read @ torch.stack(starts, -3).mT + solved.own
    return y.flatten(-3, -2)[..., : tokens.k.shape[-2], :], weight


def _solve(t: _Tokens, floor: float) -> _Solved:
    """Every chunk's answers and last weights as linear maps of its first weights."""
    total, to_end = _until(t.log_a), _after(t.log_a).exp()
    queries, keys = t.q * total.exp(), t.k * to_end
    kept = torch.diag_embed(total[..., -1, :].exp())
    own_key = (t.q * t.k).sum(-1)
    if t.b is None:
        m = decayed_products(t.q[..., None, :], t.k[..., None, :], t.log_a, (False,), floor)
        m = m[..., 0, :, 0]
        return _Solved(queries, (m + torch.diag_embed(own_key)) @ t.v, kept, t.v.mT @ keys)
    columns = t.k[..., None, :] if t.c is None else torch.stack([t.k, t.c], -2)
    m = decayed_products(torch.stack([t.q, t.b], -2), columns, t.log_a, (False, True), floor)
    m_qk, m_bk = m[..., 0, :, 0] + torch.diag_embed(own_key), m[..., 1, :, 0]
    probes = t.b * _before(total).exp()
    if t.c is None:
        # V - U solves the same system with V on its right.
        asked, steps = _solve_both(m_bk, probes, t.v)
        return _Solved(queries - m_qk @ asked, m_qk @ steps, kept - asked.mT @ keys, steps.mT @ keys)
    m_qc = m[..., 0, :, 1] + torch.diag_embed((t.q * t.c).sum(-1))
    asked, erased = _solve_both(m[..., 1, :, 1], probes, m_bk @ t.v)
    along = t.c * to_end
    return _Solved(
        queries - m_qc @ asked,
        m_qk @ t.v - m_qc @ erased,
        kept - asked.mT @ along,
        t.v.mT @ keys - erased.mT @ along,
    )


def _until(log_a: Tensor) -> Tensor:
    """log a_1 + ... + log a_t."""
    return log_a.cumsum(-2)


def _before(until: Tensor) -> Tensor:
    """The sums `until` the token before; the first is empty."""
    return F.pad(until[..., :-1, :], (0, 0, 1, 0))


def _after(log_a: Tensor) -> Tensor:
    """log a_{t+1} + ... + log a_C: a sum of its own, since a difference of long sums loses the digits of short ones."""
    later = log_a.flip(-2).cumsum(-2).flip(-2)
    return F.pad(later[..., 1:, :], (0, 0, 0, 1))


def _solve_both(strictly_lower: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """(I + N)^{-1} of two right-hand sides."""
    found = solve_unit_lower(strictly_lower, torch.cat([one, two], -1))
    return found[..., : one.shape[-1]], found[..., one.shape[-1] :]


def decayed_products(
    rows: Float[Tensor, "*batch C R K"],
    columns: Float[Tensor, "*batch C S K"],
    log_a: Float[Tensor, "*batch C K"],
    before: tuple[bool, ...],
    floor: float = -math.inf,
) -> Float[Tensor, "*batch C R C S"]:
    """M[t, r, s, j] = sum_i rows[t, r, i] columns[s, j, i] a_{s+1}[i] ... a_t[i] for s < t, else 0.

    Blocks are joined two by two, and then no exponential is taken of a positive number. They begin with one token each,
    or with so many that their exponentials, taken from the middle, fit float32.

    Args:
        rows: R vectors of every token; C is a power of two.
        columns: S vectors of every token.
        log_a: logarithms of the retentions, at most 0.
        before: which of the R meet a token before its own retention: their product ends with a_{t-1}.
        floor: what no entry of `log_a` is below.
    """
    size = rows.shape[-3]
    half = 1
    while 2 * half <= size and -2 * half * floor <= MAX_EXPONENT:
        half *= 2
    blocks = _first_blocks(rows, columns, log_a, before, half)
    while half < size:
        first, second = log_a.unflatten(-2, (-1, 2, half)).unbind(-3)
        late = _pairs(rows, half)[1] * _row_decay(_until(second), before).exp()
        early = _pairs(columns, half)[0] * _after(first).exp()[..., None, :]
        corner = _block_products(late, early)
        upper, lower = blocks.unflatten(-5, (-1, 2)).unbind(-5)
        blocks = torch.cat([F.pad(upper, (0, 0, 0, half)), torch.cat([corner, lower], -2)], -4)
        half *= 2
    return blocks.squeeze(-5)


def _first_blocks(rows: Tensor, columns: Tensor, log_a: Tensor, before: tuple[bool, ...], length: int) -> Tensor:
    """The products within blocks of `length` tokens, `[..., blocks, length, R, length, S]`."""
    if length == 1:
        *batch, size, count, _ = rows.shape
        return rows.new_zeros(*batch, size, 1, count, 1, columns.shape[-2])
    at = _until(log_a.unflatten(-2, (-1, length)))
    middle = at[..., length // 2 - 1 : length // 2, :]
    left = rows.unflatten(-3, (-1, length)) * (_row_decay(at, before) - middle[..., None, :]).exp()
    right = columns.unflatten(-3, (-1, length)) * (middle - at).exp()[..., None, :]
    # What lies after a token may overflow: it is replaced, and not multiplied by 0.
    later = torch.ones(length, length, dtype=torch.bool, device=rows.device).triu()
    return _block_products(left, right).masked_fill(later[:, None, :, None], 0.0)


def _row_decay(until: Tensor, before: tuple[bool, ...]) -> Tensor:
    """`[..., C, R, K]`: the sums `until` a token's own retention, or without it."""
    return torch.stack([_before(until) if b else until for b in before], -2)


def _block_products(left: Tensor, right: Tensor) -> Tensor:
    """`[..., N, R, K]` and `[..., M, S, K]` to their inner products `[..., N, R, M, S]`."""
    found = left.flatten(-3, -2) @ right.flatten(-3, -2).mT
    return found.unflatten(-1, right.shape[-3:-1]).unflatten(-3, left.shape[-3:-1])


def _pairs(t: Tensor, half: int) -> tuple[Tensor, ...]:
    """The first and the second of every two neighbouring blocks, `[..., pairs, half, R, K]`."""
    return t.unflatten(-3, (-1, 2, half)).unbind(-4)
