"""What a learner says of its reading."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What `Learner.observe` saw and did.

    Attributes:
        losses: `[n]`, float32, nats: of every token before anything was learned from it; NaN for a document's first
            token and for tokens that were not to be scored.
        updated: names of the levels whose period passed, once for every time, in order. Where a gate left out all of
            a period's chunks, there was nothing to update that level with, but for `retention`.
        notes: sentences about what went otherwise than planned.
    """

    losses: Float[Tensor, " n"]
    updated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Counters:
    """Tokens and chunks so far.

    Attributes:
        tokens: observed, pending ones included.
        skipped: tokens of chunks that were refused.
        chunks: learned from, or left out by the gate: those that count for the levels' periods.
        consolidations: calls of `Learner.consolidate` that were applied; -1 where that is not known, as of memories of
            version 0.2.
        adopted: memories without what going on needs (exported, merged) that were taken up, 0 or 1; -1 likewise.
    """

    tokens: int = 0
    skipped: int = 0
    chunks: int = 0
    consolidations: int = 0
    adopted: int = 0
