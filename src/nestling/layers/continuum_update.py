"""What a level of the continuum does at the end of a period (NL Eq. 71).

H `[C, K]` are the period's keys, each divided by max(1, |key|), and E = H W^T - V `[C, hidden]` its errors at the
period's first weights, divided likewise. With the level's rate r in (0, 1) the update is W + D:

    token       D = -r / C  E^T H                       every token's own error moves by r / C
    spectral    D = -r / max(1, s)  E^T H               s is at least the largest eigenvalue of H H^T
    proximal    D = -n E^T (I + n H H^T)^{-1} H         n = r / (1 - r), at most `MOST`

The proximal step is argmin_W 1/2 |H W^T - V|^2 + |W - W_0|^2 / (2 n) (NL Eq. 56 for a whole period): it multiplies the
error along an eigenvector of H H^T with value h by 1 / (1 + n h), which no rate makes unstable, and takes the share r
from the error of a lone token. In all three D = -(W - W*) P with 0 <= P <= 1, P symmetric.

s is the Schatten norm |H H^T|_4 = (tr (H H^T)^4)^{1/4}: never below the eigenvalue, at most C^{1/4} times it, smooth,
and one product. Few power iterations may end below the eigenvalue for a start that happens to be orthogonal.

With momentum b and retention a, W_0 the meta-learned weights:

    S <- b S + (1 - b) min(1, 2 (1 - b) / (1 + b)) D
    W <- W_0 + a (W + S - W_0),    S <- a S

Without targets |W + b / (1 - b) S|^2 + b / (1 - b)^2 |S|^2 then never grows, whatever the periods' P are and however
they alternate: it decreases for every eigenvalue of P up to 2 (1 - b) / (1 + b), and for no larger bound does one such
form. A step that is stable for every single P can still be driven to resonance by a text that alternates.

The period's tokens are carried where it is not over. The cheapest exact carrier are H and E themselves, or where a
period has more tokens than a key has entries, H^T H and H^T E, which take their places in every formula:
min(C, K) (K + hidden) numbers in float32 either way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nestling.memory.state import State

MOST = 100.0
"""Of the proximal step's n. Beyond it the last per cent of an error costs more digits of float32 than it is worth."""


@dataclass
class PeriodState(State):
    """What a step over the whole period needs of its tokens so far; P = min(period, K).

    Attributes:
        keys: `[N, P, K]`, H with one row a token, zeros where none was read; or H^T H.
        errors: `[N, P, hidden]`, E; or H^T E.
    """

    keys: Tensor
    errors: Tensor

    @staticmethod
    def empty(like: Float[Tensor, "N hidden K"], period: int) -> PeriodState:
        """Of no token, for a weight."""
        count, hidden, width = like.shape
        rows = min(period, width)
        return PeriodState(like.new_zeros(count, rows, width), like.new_zeros(count, rows, hidden))

    def add(self, keys: Tensor, errors: Tensor, at: int, period: int) -> PeriodState:
        """With the tokens of one call, whose first has slot `at` of the period."""
        more = PeriodState.of(keys, errors, at, period)
        return PeriodState(self.keys + more.keys, self.errors + more.errors)

    @staticmethod
    def of(keys: Tensor, errors: Tensor, at: int, period: int) -> PeriodState:
        """Of the tokens of one call alone."""
        if period > keys.shape[-1]:
            return PeriodState(keys.mT @ keys, keys.mT @ errors)
        if keys.shape[1] == period:
            return PeriodState(keys, errors)
        around = (0, 0, at, period - at - keys.shape[1])
        return PeriodState(F.pad(keys, around), F.pad(errors, around))

    def gram(self, period: int) -> Tensor:
        """H H^T, or H^T H, which has the same eigenvalues but zeros."""
        return self.keys if period > self.keys.shape[-1] else self.keys @ self.keys.mT


def spectral_step(held: PeriodState, rate: Tensor, period: int) -> Float[Tensor, "N hidden K"]:
    """D of the spectral step for r = `rate`."""
    gram = held.gram(period)
    size = (gram @ gram).square().sum((1, 2), keepdim=True).clamp_min(1).pow(0.25)
    return _product(held.errors * (-rate / size), held, period)


def proximal_step(held: PeriodState, rate: Tensor, period: int) -> Float[Tensor, "N hidden K"]:
    """D of the proximal step for r = `rate`."""
    strength = (rate / (1 - rate).clamp_min(1 / MOST)).clamp_max(MOST)
    gram = held.gram(period)
    system = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) + strength * gram
    factor = torch.linalg.cholesky_ex(system).L
    return _product(torch.cholesky_solve(held.errors * -strength, factor), held, period)


def _product(errors: Tensor, held: PeriodState, period: int) -> Tensor:
    """E^T H."""
    return errors.mT if period > held.keys.shape[-1] else errors.mT @ held.keys


def with_momentum(moved: Tensor, surprise: Tensor, kept: Tensor) -> Float[Tensor, "N hidden K"]:
    """The new S from D = `moved`, the old S and b = `kept`."""
    most = (2 * (1 - kept) / (1 + kept)).clamp_max(1)
    return kept * surprise + (1 - kept) * most * moved
