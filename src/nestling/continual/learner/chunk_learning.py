"""What a `Learner` does with the tokens of a chunk: score them, and learn from them once it is full."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.continual.component import strictest
from nestling.continual.learner.gradients import take_gradients
from nestling.continual.learner.guards import LearningWarning, check_not_diverged
from nestling.continual.learner.levels import step_levels
from nestling.continual.stream.chunks import Piece, batches, placed
from nestling.continual.stream.scoring import learning

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner


def score_chunk(learner: Learner, new: int) -> Float[Tensor, " new"]:
    """Losses of the chunk's last tokens."""
    wanted = learner.stream.last(new)
    with learning(learner.model, ()):
        work = batches(wanted, learner.settings.options.batch_tokens)
        found = [learner.reader.scores(batch).cpu().float() for batch in work]
    return placed(wanted, torch.cat(found) if found else torch.empty(0))[-new:]


def learn_chunk(learner: Learner, new: int, updated: list[str], notes: list[str]) -> Float[Tensor, " new"]:
    """Learn from the full chunk; losses of its last tokens."""
    pieces, options = learner.stream.pieces, learner.settings.options
    components = learner.components.values()
    read_with = [companion for component in components for companion in component.companions()]
    bounds, parameters = strictest([component.bounds() for component in components]), learner.parameters
    with learning(learner.model, learner.everything):
        seen = take_gradients(
            learner.reader, pieces, read_with, options.batch_tokens, learner.guard, bounds, parameters
        )
        if seen.refusal is None:
            updated.extend(step_levels(learner.optimizer, learner.weights, components, options))
    if seen.refusal is None:
        _count(learner, pieces, seen.losses)
    else:
        _refuse(learner, seen.refusal, notes)
    learner.stream.end_chunk()
    return placed(pieces, seen.losses.float())[-new:]


def _count(learner: Learner, pieces: Sequence[Piece], losses: Float[Tensor, " targets"]) -> None:
    learner.counters.chunks += 1
    learner.refused = 0
    if len(losses):
        learner.guard.accept(float(losses.mean()))
    for component in learner.components.values():
        component.learned(pieces, losses)


def _refuse(learner: Learner, reason: str, notes: list[str]) -> None:
    learner.refused += 1
    patience, chunk = learner.settings.options.patience, learner.stream.chunk
    check_not_diverged(learner.everything, learner.refused, patience, reason)
    learner.counters.skipped += chunk
    notes.append(f"{chunk} tokens were not learned from: {reason}")
    warnings.warn(notes[-1], LearningWarning, stacklevel=5)
