"""Offline consolidation ("sleep"): what the fast levels learned goes into the slower ones, and the fast ones are freed.

The paper names offline consolidation (NL section 1.1) and gives no equation; this is ours, with its measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW

from nestling.continual.learner.levels import rate
from nestling.continual.learner.steps import retain
from nestling.continual.learner.weights import exchanged
from nestling.continual.replay.buffer import ReplayBuffer
from nestling.continual.replay.rehearsal import written_pieces
from nestling.continual.stream.chunks import Piece, batches, decode
from nestling.continual.stream.scoring import divergences, learning, losses_of

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner

GENERATED = 8
"""Pieces generated where there is no buffer to replay."""


@dataclass(frozen=True)
class Consolidation:
    """What a consolidation did, on pieces that it did not learn from (`held_out` of them).

    It helped where `loss_after` is below `loss_forgotten`: so much of what the fast levels knew is in the slower ones.

    Attributes:
        fast, slow: the levels that forgot, and those that learned.
        pieces, held_out: learned from, and measured on. With a single piece both are that one.
        loss_before, loss_forgotten, loss_after: mean loss in nats before, once the fast levels have forgotten and
            nothing else, and at the end.
        divergence_forgotten, divergence_after: KL(model before || model), nats a token; 0 before.
        applied: False if a loss was not finite: then everything is as it was before.
    """

    fast: tuple[str, ...]
    slow: tuple[str, ...]
    pieces: int
    held_out: int
    loss_before: float
    loss_forgotten: float
    loss_after: float
    divergence_forgotten: float
    divergence_after: float
    applied: bool


def consolidate(
    learner: Learner,
    *,
    fast: Sequence[str] | None,
    retention: float,
    steps: int,
    lr: float | None,
    rows: int,
    held_out: float,
    seed: int,
) -> Consolidation:
    """Let the fast levels forget, and the slower ones learn to say what the model said before:

        W_f <- W_f0 + retention (W_f - W_f0)
        W_s <- steps of AdamW on mean KL(p_before || p), of replayed pieces

    The forgetting comes first: with the fast levels as they were there would be nothing to distil. The text is the
    replay buffer's; without one the model as it is generates it. The levels' own optimizers keep their states, and
    pending tokens are learned with the new weights.

    Args:
        learner: attached, of two levels or more.
        fast: levels to forget; None is all but the slowest. The others learn.
        retention: kept fraction of what a fast level learned; 0 returns it to its initial state.
        steps: of distillation; 0 only forgets.
        lr: of the slower levels; None is each level's own rate.
        rows: pieces of one step.
        held_out: fraction of the pieces measured on, not learned from.
        seed: of the choice of pieces and of generated text.

    Cost: a step reads its pieces once without and once with gradients; a second copy of the levels' weights and the
    state of AdamW for the slow ones while it lasts.

    Raises:
        ValueError: an argument out of range, or no level on one of the two sides.
        RuntimeError: the learner is detached.
    """
    slow = _sides(learner, fast)
    _check(retention, steps, lr, rows, held_out)
    names = [name for name in learner.weights if name not in slow]
    pieces = _text(learner, seed)
    generator = torch.Generator().manual_seed(seed)
    order = [pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()]
    kept_apart = min(max(1, round(held_out * len(order))), max(1, len(order) - 1))
    held, taught = order[:kept_apart], order[kept_apart:] or order
    every = [p for weights in learner.weights.values() for p in weights.learned]
    students = [p for name in slow for p in learner.weights[name].learned]
    teacher = _Teacher(learner, every)
    try:
        with learning(learner.model, students):
            before, _ = teacher.measure(held)
            for name in names:
                retain(learner.weights[name].anchored, retention)
            forgotten = teacher.measure(held)
            _distil(learner, teacher, taught, slow, steps, lr, rows, generator)
            after = teacher.measure(held)
    except BaseException:
        teacher.put_back()
        raise
    applied = all(math.isfinite(x) for x in (*forgotten, *after))
    if not applied:
        teacher.put_back()
    else:
        learner.weights_replaced()
    return Consolidation(
        tuple(names),
        tuple(slow),
        len(taught),
        len(held),
        before,
        forgotten[0],
        after[0],
        forgotten[1],
        after[1],
        applied,
    )


class _Teacher:
    """The model as it was, under the same modules: its values change places with the present ones to be asked."""

    def __init__(self, learner: Learner, every: list[Tensor]) -> None:
        self.learner, self.every = learner, every
        self.values = [p.detach().clone() for p in every]

    @torch.no_grad()
    def put_back(self) -> None:
        """Everything as it was."""
        for p, value in zip(self.every, self.values, strict=True):
            p.copy_(value)

    @torch.no_grad()
    def logits(self, pieces: Sequence[Piece]) -> Float[Tensor, "targets vocab"]:
        """What the model said."""
        with exchanged(self.every, self.values):
            return self.learner.reader.logits(pieces)

    @torch.no_grad()
    def measure(self, pieces: Sequence[Piece]) -> tuple[float, float]:
        """Mean loss of the present model, and its mean divergence from the one before."""
        loss, divergence, count = 0.0, 0.0, 0
        for batch in batches(pieces, self.learner.settings.options.batch_tokens):
            said, says = self.logits(batch), self.learner.reader.logits(batch)
            loss += float(losses_of(says, batch).sum())
            divergence += float(divergences(said, says).sum())
            count += len(says)
        return loss / count, divergence / count


def _distil(
    learner: Learner,
    teacher: _Teacher,
    pieces: Sequence[Piece],
    slow: Sequence[str],
    steps: int,
    lr: float | None,
    rows: int,
    generator: torch.Generator,
) -> None:
    levels = learner.settings.levels
    fastest = min(level.period for level in levels.values())
    groups = [
        {
            "params": learner.weights[name].learned,
            "lr": rate(learner.settings, levels[name], fastest) if lr is None else lr,
        }
        for name in slow
    ]
    optimizer = AdamW(groups, betas=learner.settings.options.betas, weight_decay=0.0)
    for _ in range(steps):
        chosen = [pieces[i] for i in torch.randperm(len(pieces), generator=generator)[:rows].tolist()]
        optimizer.zero_grad()
        total = sum(int(piece.targets.sum()) for piece in chosen)
        for batch in batches(chosen, learner.settings.options.batch_tokens):
            said, says = teacher.logits(batch), learner.reader.logits(batch)
            (divergences(said, says).sum() / total).backward()
        optimizer.step()


def _sides(learner: Learner, fast: Sequence[str] | None) -> list[str]:
    """Names of the levels that learn."""
    names = list(learner.weights)
    fast = names[:-1] if fast is None else list(fast)
    slow = [name for name in names if name not in fast]
    if unknown := [name for name in fast if name not in names]:
        raise ValueError(f"fast names {', '.join(unknown)}; the levels are {', '.join(names)}")
    if not fast or not slow:
        raise ValueError(f"consolidation takes levels to forget and levels to learn; of {', '.join(names)} it has only "
                         f"{'levels to forget' if fast else 'levels to learn'}")  # fmt: skip
    return slow


def _check(retention: float, steps: int, lr: float | None, rows: int, held_out: float) -> None:
    whole = all(isinstance(n, int) for n in (steps, rows))
    if not whole or not 0 <= retention <= 1 or not 0 <= held_out < 1 or steps < 0 or rows < 1:
        raise ValueError(
            "retention is in [0, 1], held_out in [0, 1), steps a whole number from 0, rows one from 1; got "
            f"{retention}, {held_out}, {steps}, {rows}"
        )
    if lr is not None and not 0 <= lr < math.inf:
        raise ValueError(f"lr is a number, 0 or more, or None, not {lr}")


def _text(learner: Learner, seed: int) -> list[Piece]:
    """The buffer's pieces, or generated ones of half a context."""
    buffer = learner.component(ReplayBuffer)
    if buffer is not None and len(buffer.pieces):
        return [decode(item.tokens, item.metadata["start"]) for item in buffer.pieces.items]
    return written_pieces(learner, GENERATED, max(2, learner.settings.context // 2), seed)
