"""The one rule in closed form: a chunk of tokens as matrix products and one unit-triangular solve.

Notation (one chunk of C tokens; row t of X is x_t, of Gr is g_t): A[t, s] = prod_{r=s+1..t} a_r for s <= t, else 0; B
likewise from b; A0[t] = prod_{r<=t} a_r, B0 likewise; D = A B; d0 = A B0; sh(.) puts row t-1 in row t. With u_t =
W_{t-1} x_t and the erased part E_t = e_t u_t,

    (I + N) U = sh(A0) (X W_0^T) + sh(d0) (X S_0^T) - (sh(D) * X X^T) (l g)
    N[t, s]   = A[t-1, s] e_s (x_s . x_t)   for s < t
    W_t q_t   = A0[t] W_0 q_t + d0[t] S_0 q_t - sum_r D[t,r] (x_r.q_t) l_r g_r - sum_s A[t,s] (x_s.q_t) E_s
    W_C       = A0[C] W_0 + d0[C] S_0 - (D[C,:] * l g + A[C,:] * E)^T X
    S_C       = B0[C] S_0 - (B[C,:] * l g)^T X

Without momentum D = A, d0 = 0, and P = l g + E solves (I + diag(e) strictly_lower(sh(A) * X X^T)) P = l g + e * sh(A0)
(X W_0^T).

Online gradients g_t = u_t - v_t follow the weights, as the erased part does. Without momentum l joins e, and -v takes
the place of g. With momentum S is linear in earlier u: -v takes the place of g on the right, N gains a term,

    N[t, s]   = (A[t-1, s] e_s + D[t-1, s] l_s) (x_s . x_t)   for s < t

and l g = l (u - v) in what comes after.

Tokens that are not there (`valid` is False) leave W and S as they are: a = b = 1, e = l = 0, and their S is not added,
so D = A diag(valid) B and d0 = A (valid * B0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from nestling.ops import native


@dataclass(frozen=True)
class Decay:
    """Products of the retentions and momenta of one chunk. `None` fields: the rule has no retention or no momentum.

    S is C, and longer where tokens before the chunk are written again (`ops.window_rule`).

    Attributes:
        inner: A, `[..., C, S]`, lower triangular with the diagonal.
        start: A0, `[..., C]`.
        inner_momentum: D, `[..., C, S]`.
        start_momentum: d0, `[..., C]`.
        last_momentum: last row of B, `[..., S]`.
        last_start_momentum: last entry of B0, `[...]`.
    """

    inner: Float[Tensor, "*batch C S"]
    start: Float[Tensor, "*batch C"]
    inner_momentum: Float[Tensor, "*batch C S"] | None = None
    start_momentum: Float[Tensor, "*batch C"] | None = None
    last_momentum: Float[Tensor, "*batch S"] | None = None
    last_start_momentum: Float[Tensor, "*batch"] | None = None

    def unsqueeze(self, dim: int) -> Decay:
        """The same products with a new batch dimension (negative `dim` counts from the batch dimensions' end)."""
        t = dim - 2
        return Decay(
            self.inner.unsqueeze(t),
            self.start.unsqueeze(t + 1),
            None if self.inner_momentum is None else self.inner_momentum.unsqueeze(t),
            None if self.start_momentum is None else self.start_momentum.unsqueeze(t + 1),
            None if self.last_momentum is None else self.last_momentum.unsqueeze(t + 1),
            None if self.last_start_momentum is None else self.last_start_momentum.unsqueeze(t + 2),
        )


def decay_products(
    log_retention: Float[Tensor, "*batch C"],
    log_momentum: Float[Tensor, "*batch C"] | None = None,
    valid: Bool[Tensor, "*#batch C"] | None = None,
) -> Decay:
    """A, A0 and, with momentum, D, d0 and the last rows of B, from the logarithms of a and b (both <= 0)."""
    if valid is not None:
        log_retention = log_retention * valid
        log_momentum = None if log_momentum is None else log_momentum * valid
    inner, start = _products(log_retention)
    if log_momentum is None:
        return Decay(inner, start)
    b_inner, b_start = _products(log_momentum)
    left = inner if valid is None else inner * valid[..., None, :]
    return Decay(
        inner,
        start,
        left @ b_inner,
        (left @ b_start[..., None])[..., 0],
        b_inner[..., -1, :],
        b_start[..., -1],
    )


def _products(log_rate: Tensor) -> tuple[Tensor, Tensor]:
    total = log_rate.cumsum(-1)
    # Above the diagonal the span is positive: bounded before exp, so that no infinity meets a zero.
    span = (total[..., :, None] - total[..., None, :]).clamp_max(0)
    return span.exp().tril(), total.exp()


def _shift(rows: Tensor, first: float) -> Tensor:
    """Row t-1 in row t (dimension -2); row 0 holds `first`."""
    return F.pad(rows[..., :-1, :], (0, 0, 1, 0), value=first)


@dataclass(frozen=True)
class Writes:
    """What a chunk writes: `step` = l g `[..., C, V]` and `erased` = e_t W_{t-1} x_t (None when all of it is in step).

    Without momentum the two enter every formula with the same factor, so `step` holds their sum P.
    """

    x: Float[Tensor, "*batch C K"]
    step: Float[Tensor, "*batch C V"]
    erased: Float[Tensor, "*batch C V"] | None


def chunk_writes(
    x: Float[Tensor, "*batch C K"],
    step: Float[Tensor, "*batch C V"],
    erase: Float[Tensor, "*#batch C"] | None,
    decay: Decay,
    weight: Float[Tensor, "*batch V K"],
    surprise: Float[Tensor, "*batch V K"] | None = None,
    recalled: Float[Tensor, "*batch C V"] | None = None,
    online_lr: Float[Tensor, "*#batch C"] | None = None,
) -> Writes:
    """Solve a chunk for what its tokens erase, and for their gradients where those are online.

    Args:
        x: inputs of the weight.
        step: l_t g_t; with `online_lr` minus l_t times the target.
        erase: e_t, or None for no erase (with given gradients no solve is then needed).
        decay: `decay_products` of the chunk.
        weight: running fast weights before the chunk's first token, W_0.
        surprise: S_0; given exactly when `decay` has momentum.
        recalled: X W_0^T if it is at hand already.
        online_lr: l_t where gradients are online, None where they are given.
    """
    if decay.inner_momentum is None and online_lr is not None:
        erase = online_lr if erase is None else erase + online_lr
    if erase is None and online_lr is None:
        return Writes(x, step, None)
    gram = x @ x.mT
    if recalled is None:
        recalled = x @ weight.mT
    start = _shift(decay.start[..., None], 1.0)
    inner = _shift(decay.inner, 0.0) * gram
    if decay.inner_momentum is None:
        assert erase is not None
        e = erase[..., None]
        return Writes(x, solve_unit_lower(inner * e, torch.addcmul(step, e * start, recalled)), None)
    assert surprise is not None and decay.start_momentum is not None
    pushed = _shift(decay.inner_momentum, 0.0) * gram
    from_momentum = _shift(decay.start_momentum[..., None], 0.0) * (x @ surprise.mT)
    right = torch.addcmul(from_momentum, start, recalled) - pushed @ step
    system = None if erase is None else inner * erase[..., None, :]
    if online_lr is not None:
        follows = pushed * online_lr[..., None, :]
        system = follows if system is None else system + follows
    assert system is not None
    before = solve_unit_lower(system, right)
    erased = None if erase is None else erase[..., None] * before
    return Writes(x, step if online_lr is None else torch.addcmul(step, online_lr[..., None], before), erased)


def solve_unit_lower(strictly_lower: Tensor, right: Tensor) -> Tensor:
    """(I + N)^{-1} R for strictly lower triangular N; entries of N on and above the diagonal are not read."""
    if strictly_lower.shape[-1] == 1:
        return right
    return torch.linalg.solve_triangular(strictly_lower, right, upper=False, unitriangular=True)


def chunk_read(
    q: Float[Tensor, "*batch C K"],
    writes: Writes,
    decay: Decay,
    weight: Float[Tensor, "*batch V K"],
    surprise: Float[Tensor, "*batch V K"] | None = None,
    before: bool = False,
) -> Float[Tensor, "*batch C V"]:
    """Every token reads its own fast weights: W_t q_t, or W_{t-1} q_t with `before`."""
    match_ = q @ writes.x.mT
    inner, start = decay.inner, decay.start[..., None]
    if before:
        inner, start = _shift(inner, 0.0), _shift(start, 1.0)
    y = start * (q @ weight.mT)
    if decay.inner_momentum is None:
        return y - (inner * match_) @ writes.step
    assert surprise is not None and decay.start_momentum is not None
    inner_m, start_m = decay.inner_momentum, decay.start_momentum[..., None]
    if before:
        inner_m, start_m = _shift(inner_m, 0.0), _shift(start_m, 0.0)
    y = y + start_m * (q @ surprise.mT) - (inner_m * match_) @ writes.step
    return y if writes.erased is None else y - (inner * match_) @ writes.erased


def chunk_advance(
    writes: Writes,
    decay: Decay,
    weight: Float[Tensor, "*batch V K"],
    surprise: Float[Tensor, "*batch V K"] | None = None,
) -> tuple[Float[Tensor, "*batch V K"], Float[Tensor, "*batch V K"] | None]:
    """W_C and S_C after the chunk's last token."""
    kept = decay.start[..., -1, None, None] * weight
    last = decay.inner[..., -1, :, None]
    if decay.inner_momentum is None:
        return kept - (last * writes.step).mT @ writes.x, None
    assert surprise is not None and decay.start_momentum is not None
    assert decay.last_momentum is not None and decay.last_start_momentum is not None
    total = decay.inner_momentum[..., -1, :, None] * writes.step
    if writes.erased is not None:
        total = torch.addcmul(total, last, writes.erased)
    weight = torch.addcmul(kept, decay.start_momentum[..., -1, None, None], surprise) - total.mT @ writes.x
    pushed = (decay.last_momentum[..., :, None] * writes.step).mT @ writes.x
    return weight, decay.last_start_momentum[..., None, None] * surprise - pushed


_Scanned = tuple[Tensor, Tensor, Tensor | None]


def chunk_scan(
    x: Float[Tensor, "*batch T K"],
    g: Float[Tensor, "*batch T V"],
    q: Float[Tensor, "*batch T K"],
    *,
    weight: Float[Tensor, "*batch V K"],
    chunk_size: int,
    surprise: Float[Tensor, "*batch V K"] | None = None,
    log_retention: Float[Tensor, "*batch T"] | None = None,
    erase: Float[Tensor, "*batch T"] | None = None,
    inner_lr: Float[Tensor, "*batch T"] | None = None,
    log_momentum: Float[Tensor, "*batch T"] | None = None,
    online: bool = False,
    read_before: bool = False,
    schedule: str | None = None,
) -> tuple[Float[Tensor, "*batch T V"], Tensor, Tensor | None]:
    """The rule over a whole sequence when x, g and the rates do not depend on the fast weights.

    Arguments and results as `ops.reference.token_rule`, with logarithms of a and b. With `online`, g is minus the
    target, and the result is the token-by-token update for every chunk size. `schedule="parallel"` solves all chunks
    at once and carries only one product per chunk; `"sequential"` runs one chunk after the other and needs less memory.
    None takes compiled code where there is some (on CPUs, without momentum), else "parallel".

    Raises:
        ValueError: surprise without momentum, an unknown schedule, or a chunk below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    if surprise is not None and log_momentum is None:
        raise ValueError("a surprise needs log_momentum: without momentum it never reaches the weights")
    if schedule not in (None, "parallel", "sequential"):
        raise ValueError(f"schedule is 'parallel', 'sequential' or None, not {schedule!r}")
    tokens = x.shape[:-1]
    rate = torch.ones_like(x[..., 0]) if inner_lr is None else inner_lr.expand(tokens)
    if online and log_momentum is None:
        erase = rate if erase is None else erase + rate
    erase = None if erase is None else erase.expand(tokens)
    log_a = torch.zeros_like(rate) if log_retention is None else log_retention.expand(tokens)
    if log_momentum is not None and surprise is None:
        surprise = torch.zeros_like(weight)
    if not x.shape[-2]:
        return torch.zeros_like(g), weight, surprise

    def plain(
        x: Tensor, g: Tensor, rate: Tensor, erase: Tensor | None, log_a: Tensor, q: Tensor, weight: Tensor
    ) -> _Scanned:
        online_lr = rate if online and log_momentum is not None else None
        known = _Tokens(x, rate[..., None] * g, q, erase, log_a, log_momentum, online_lr)
        scan = _scan_sequential if schedule == "sequential" else _scan_parallel
        return scan(known, weight, surprise, chunk_size, read_before)

    tensors = (x, g, rate, erase, log_a, q, weight)
    if schedule is None and log_momentum is None and native.fits(x[..., :1, :], weight):
        size = min(chunk_size, native.SCAN_CHUNK)
        y, last = native.native_scan(lambda *t: plain(*t)[:2], tensors, size, read_before)
        return y, last, None
    return plain(*tensors)


@dataclass(frozen=True)
class _Tokens:
    """What the scan needs of every token: inputs, steps l g, queries, e, the logarithms of a and b, online l."""

    x: Tensor
    step: Tensor
    q: Tensor
    erase: Tensor | None
    log_a: Tensor
    log_b: Tensor | None
    online_lr: Tensor | None

    def part(self, t: slice) -> _Tokens:
        """Tokens `t` of all."""
        return self._each(lambda rows: rows[..., t, :])

    def fold(self, size: int) -> _Tokens:
        """All tokens as `[..., chunks, size, D]`, zeros after the last."""
        return self._each(lambda rows: F.pad(rows, (0, 0, 0, -rows.shape[-2] % size)).unflatten(-2, (-1, size)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> _Tokens:
        """`change` of everything, as rows `[..., T, D]`."""
        e, log_a, log_b, lr = (
            None if rate is None else change(rate[..., None])[..., 0]
            for rate in (self.erase, self.log_a, self.log_b, self.online_lr)
        )
        assert log_a is not None
        return _Tokens(change(self.x), change(self.step), change(self.q), e, log_a, log_b, lr)


def _scan_sequential(tokens: _Tokens, weight: Tensor, surprise: Tensor | None, size: int, before: bool) -> _Scanned:
    outputs = []
    for at in range(0, tokens.x.shape[-2], size):
        chunk = tokens.part(slice(at, at + size))
        decay = decay_products(chunk.log_a, chunk.log_b)
        writes = _writes(chunk, chunk.step, decay, weight, surprise)
        outputs.append(chunk_read(chunk.q, writes, decay, weight, surprise, before))
        weight, surprise = chunk_advance(writes, decay, weight, surprise)
    return torch.cat(outputs, dim=-2), weight, surprise


def _writes(chunk: _Tokens, step: Tensor, decay: Decay, weight: Tensor, surprise: Tensor | None) -> Writes:
    return chunk_writes(chunk.x, step, chunk.erase, decay, weight, surprise, online_lr=chunk.online_lr)


def _scan_parallel(tokens: _Tokens, weight: Tensor, surprise: Tensor | None, size: int, before: bool) -> _Scanned:
    """A chunk maps its first weights linearly, [W_C | S_C] = [W_0 | S_0] F + H; find F and H of all chunks, then chain.

    The map's parts come from `chunk_writes` and `chunk_advance` themselves, fed with the identity for W_0 (and S_0) and
    no step, and with zero weights and the true step.
    """
    time = tokens.x.shape[-2]
    size = min(size, time)
    chunks = tokens.fold(size)
    valid = None
    if time % size:
        valid = torch.arange(chunks.x.shape[-3] * size, device=weight.device).reshape(-1, size) < time
    decay = decay_products(chunks.log_a, chunks.log_b, valid)

    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device).expand(*chunks.x.shape[:-2], -1, -1)
    zero = chunks.x.new_zeros(*chunks.x.shape[:-2], weight.shape[-2], weight.shape[-1])
    off_w, off_s = _response(chunks, chunks.step, decay, zero, None if surprise is None else zero)
    no_step = torch.zeros_like(chunks.x)
    w_to_w, w_to_s = _response(chunks, no_step, decay, eye, None if surprise is None else torch.zeros_like(eye))
    s_to_w = s_to_s = None
    if surprise is not None:
        s_to_w, s_to_s = _response(chunks, no_step, decay, torch.zeros_like(eye), eye)

    starts_w, starts_s = [], []
    for n in range(chunks.x.shape[-3]):
        first = weight
        starts_w.append(first)
        weight = first @ w_to_w[..., n, :, :] + off_w[..., n, :, :]
        if surprise is not None:
            assert w_to_s is not None and s_to_w is not None and s_to_s is not None and off_s is not None
            starts_s.append(surprise)
            weight = weight + surprise @ s_to_w[..., n, :, :]
            surprise = surprise @ s_to_s[..., n, :, :] + off_s[..., n, :, :]
            if chunks.online_lr is not None:
                surprise = surprise + first @ w_to_s[..., n, :, :]
    w0 = torch.stack(starts_w, dim=-3)
    s0 = torch.stack(starts_s, dim=-3) if starts_s else None
    writes = _writes(chunks, chunks.step, decay, w0, s0)
    y = chunk_read(chunks.q, writes, decay, w0, s0, before)
    return y.flatten(-3, -2)[..., :time, :], weight, surprise


def _response(
    chunks: _Tokens, step: Tensor, decay: Decay, weight: Tensor, surprise: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(W_C, S_C) of every chunk from the given (W_0, S_0) and steps."""
    return chunk_advance(_writes(chunks, step, decay, weight, surprise), decay, weight, surprise)
