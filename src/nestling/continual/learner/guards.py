"""What a learner does not learn from: losses that cannot be right."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class LearningWarning(UserWarning):
    """A chunk was not learned from; weights and optimizers are as before it."""


class LearningDivergedError(ArithmeticError):
    """The learned weights are no longer finite: nothing can go on but from a saved memory."""


class SpikeGuard:
    """Refuses losses that are not finite or far above what they were.

    Args:
        factor: a chunk's mean loss above this many times the running mean (0.9 of it kept from chunk to chunk) is a
            spike; None refuses only what is not finite.
        patience: spikes on end after which the running mean starts anew: then the stream has changed for good.
        floor: nats; no loss below it is a spike. The loss of a guess among all tokens: after a text known by heart any
            other text is ten times as surprising, and is the one to learn from.
    """

    KEPT = 0.9

    def __init__(self, factor: float | None, patience: int, floor: float) -> None:
        self.factor, self.patience, self.floor = factor, patience, floor
        self.mean: float | None = None
        self.spikes = 0

    def refusal(self, loss: float) -> str | None:
        """Why a chunk of this mean loss is not to be learned from, or None. Spikes are counted here."""
        if not math.isfinite(loss):
            return "its loss is not finite"
        if self.factor is None or self.mean is None or loss <= max(self.floor, self.factor * self.mean):
            return None
        self.spikes += 1
        reason = f"its loss of {loss:.3g} nats is more than {self.factor:g} times the running mean of {self.mean:.3g}"
        if self.spikes >= self.patience:
            self.mean, self.spikes = None, 0
            reason += "; it was so for several chunks, so the running mean starts anew"
        return reason

    def accept(self, loss: float) -> None:
        """Count the mean loss of a chunk that was learned from."""
        self.mean = loss if self.mean is None else self.KEPT * self.mean + (1 - self.KEPT) * loss
        self.spikes = 0


def check_not_diverged(weights: Iterable[Tensor], refused: int, patience: int, reason: str) -> None:
    """Raises LearningDivergedError where a chunk was refused and nothing good can come of going on.

    Args:
        weights: what is learned.
        refused: chunks on end, this one included.
        patience: more of them than this, not finite, are too many.
        reason: why the last was.
    """
    advice = "restore the learner from its last saved memory and lower lr"
    if not all(bool(torch.isfinite(w).all()) for w in weights):
        raise LearningDivergedError(f"learned weights are not finite; {advice}")
    if refused > patience and "not finite" in reason:
        raise LearningDivergedError(f"{refused} chunks on end were refused, the last since {reason}; {advice}")
