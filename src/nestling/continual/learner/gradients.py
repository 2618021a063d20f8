"""A chunk's gradient: its pieces read with gradients, what is replayed with them, and what is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.continual.component import Bounds, Companion
from nestling.continual.learner.guards import SpikeGuard
from nestling.continual.learner.steps import norm, project
from nestling.continual.stream.chunks import Piece, batches
from nestling.continual.stream.scoring import Reader


@dataclass(frozen=True)
class ChunkLosses:
    """What reading a chunk gave.

    Attributes:
        losses: of its targets, in order, nats, detached, on the CPU.
        refusal: why it must not be learned from; then there are no gradients to be used.
        learned: how many targets are learned from. At 0 there are no gradients to be used.
    """

    losses: Float[Tensor, " targets"]
    refusal: str | None
    learned: int


def take_gradients(
    reader: Reader,
    pieces: Sequence[Piece],
    companions: Sequence[Companion],
    budget: int,
    guard: SpikeGuard,
    bounds: Bounds,
    levels: Mapping[str, Sequence[Tensor]],
) -> ChunkLosses:
    """Read a chunk and leave its gradient, with that of what is read with it, in `.grad`; none if it is not learned
    from.

    Args:
        reader: of the model.
        pieces: the chunk.
        companions: what is read with it.
        budget: tokens of one forward pass.
        guard, bounds: what a chunk must pass.
        levels: the learned tensors by level.
    """
    joined = [each for each in companions if each.losses is None]
    seen = read_with_gradients(reader, pieces, joined, budget, guard, bounds)
    if not seen.learned:
        for parameters in levels.values():
            for p in parameters:
                p.grad = None
    elif all_finite(levels):
        for each in companions:
            if each.losses is not None:
                add_apart(each, each.losses, budget, levels)
    return seen if seen.refusal or all_finite(levels) else replace(seen, refusal="its gradient is not finite")


def read_with_gradients(
    reader: Reader,
    pieces: Sequence[Piece],
    joined: Sequence[Companion],
    budget: int,
    guard: SpikeGuard,
    bounds: Bounds,
) -> ChunkLosses:
    """Add to `.grad` the gradient of

        1/n sum_i [l_i is learned from] l_i + sum_c weight_c / m_c sum_j r_cj

    with l the losses of the chunk's n targets and r_c those of the m_c targets of a companion. What a bound on tokens
    leaves out counts in n: a chunk with little to learn moves the weights little, where the optimizer minds the scale.

    Everything is known before the last backward pass, so that a chunk that is refused, or left out whole, costs no
    backward pass when it fits one batch.
    """
    n = sum(int(piece.targets.sum()) for piece in pieces)
    beside = {id(piece): each.weight / _targets(each) for each in joined for piece in each.pieces}
    found: list[Tensor] = []
    learned = 0
    # The stream's pieces last: then the last batch holds the last of them.
    work = batches([*(piece for each in joined for piece in each.pieces), *pieces], budget) if n else []
    for number, batch in enumerate(work, 1):
        objective: Tensor | float = 0.0
        losses = reader.losses(batch)
        for piece, part in zip(batch, losses.split([int(p.targets.sum()) for p in batch]), strict=True):
            if id(piece) in beside:
                objective = objective + beside[id(piece)] * part.sum()
                continue
            found.append(part.detach())
            chosen = part if bounds.token == -math.inf else part[part.detach() > bounds.token]
            learned += len(chosen)
            objective = objective + chosen.sum() / n
        if number == len(work):
            mean = float(torch.cat(found).mean())
            refusal = guard.refusal(mean)
            if mean <= bounds.chunk:
                learned = 0
            if refusal is not None or learned == 0:
                return ChunkLosses(torch.cat(found).cpu(), refusal, 0)
        assert isinstance(objective, Tensor)
        objective.backward()
    return ChunkLosses(torch.cat(found).cpu() if found else torch.empty(0), None, learned)


def add_apart(
    companion: Companion,
    losses: Callable[[Sequence[Piece]], Tensor],
    budget: int,
    levels: Mapping[str, Sequence[Tensor]],
) -> None:
    """Add `weight` times the gradient of the pieces' mean loss to every level's; before that, with `projection`, take
    out of the level's what would raise that loss."""
    m = _targets(companion)
    if not companion.projection:
        # Gradients stay where they are: optimizers that watch the layers take cleared ones for a new step.
        for batch in batches(companion.pieces, budget) if companion.weight else ():
            (losses(batch).sum() * (companion.weight / m)).backward()
        return
    everything = [p for parameters in levels.values() for p in parameters]
    of_chunk = {id(p): p.grad for p in everything}
    for p in everything:
        p.grad = None
    for batch in batches(companion.pieces, budget):
        (losses(batch).sum() / m).backward()
    for parameters in levels.values():
        both = [p for p in parameters if p.grad is not None and of_chunk[id(p)] is not None]
        project([of_chunk[id(p)] for p in both], [p.grad for p in both])  # type: ignore[misc]  # no None, see above
        for p in parameters:
            again, p.grad = p.grad, of_chunk[id(p)]
            if again is not None and companion.weight:
                again = again.mul_(companion.weight)
                p.grad = again if p.grad is None else p.grad.add_(again)


def all_finite(levels: Mapping[str, Sequence[Tensor]]) -> bool:
    """Whether no gradient holds NaN or infinity, nor has a norm that overflows."""
    return all(
        norm([p.grad for p in parameters if p.grad is not None]) < float("inf") for parameters in levels.values()
    )


def _targets(companion: Companion) -> int:
    return sum(int(piece.targets.sum()) for piece in companion.pieces)
