"""A chunk's gradient: its pieces read with gradients, what is replayed with them, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.continual.learner.guards import SpikeGuard, SurpriseGate
from nestling.continual.learner.options import Options
from nestling.continual.learner.steps import norm, project
from nestling.continual.replay.auxiliary_losses import Beside
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
    joined: Sequence[Piece],
    beside: Sequence[Beside],
    options: Options,
    guard: SpikeGuard,
    gate: SurpriseGate | None,
    levels: Mapping[str, Sequence[Tensor]],
) -> ChunkLosses:
    """Read a chunk and leave its gradient, with that of what is read with it, in `.grad`; none if it is not learned
    from.

    Args:
        reader: of the model.
        pieces: the chunk.
        joined: replayed pieces, read in the chunk's own pass.
        beside: what is read in passes of its own.
        options: of the learner.
        guard, gate: what a chunk must pass.
        levels: the learned tensors by level.
    """
    weight, budget = 0.0 if options.replay is None else options.replay.weight, options.batch_tokens
    seen = read_with_gradients(reader, pieces, joined, weight, budget, guard, gate)
    if not seen.learned:
        for parameters in levels.values():
            for p in parameters:
                p.grad = None
    elif all_finite(levels):
        for each in beside:
            add_beside(each, budget, levels)
    return seen if seen.refusal or all_finite(levels) else replace(seen, refusal="its gradient is not finite")


def read_with_gradients(
    reader: Reader,
    pieces: Sequence[Piece],
    replayed: Sequence[Piece],
    weight: float,
    budget: int,
    guard: SpikeGuard,
    gate: SurpriseGate | None,
) -> ChunkLosses:
    """Add to `.grad` the gradient of

        1/n sum_i [l_i is learned from] l_i + weight / m sum_j r_j

    with l the losses of the chunk's n targets and r those of the replayed pieces' m ones. What a token gate leaves out
    counts in n: a chunk with little to learn moves the weights little, where the optimizer minds the scale.

    Everything is known before the last backward pass, so that a chunk that is refused, or left out whole, costs no
    backward pass when it fits one batch.
    """
    n = sum(int(piece.targets.sum()) for piece in pieces)
    m = sum(int(piece.targets.sum()) for piece in replayed)
    bound = -float("inf") if gate is None else gate.bound()
    by_token = gate is not None and gate.gate.by == "token"
    own = {id(piece) for piece in pieces}
    found: list[Tensor] = []
    learned = 0
    # The stream's pieces last: then the last batch holds the last of them.
    work = batches([*replayed, *pieces], budget) if n else []
    for number, batch in enumerate(work, 1):
        objective: Tensor | float = 0.0
        losses = reader.losses(batch)
        for piece, part in zip(batch, losses.split([int(p.targets.sum()) for p in batch]), strict=True):
            if id(piece) not in own:
                objective = objective + weight / m * part.sum()
                continue
            found.append(part.detach())
            chosen = part[part.detach() > bound] if by_token else part
            learned += len(chosen)
            objective = objective + chosen.sum() / n
        if number == len(work):
            mean = float(torch.cat(found).mean())
            refusal = guard.refusal(mean)
            if gate is not None and not by_token and mean <= bound:
                learned = 0
            if refusal is not None or learned == 0:
                return ChunkLosses(torch.cat(found).cpu(), refusal, 0)
        assert isinstance(objective, Tensor)
        objective.backward()
    return ChunkLosses(torch.cat(found).cpu() if found else torch.empty(0), None, learned)


def add_beside(beside: Beside, budget: int, levels: Mapping[str, Sequence[Tensor]]) -> None:
    """Add `weight` times the gradient of the pieces' mean loss to every level's; before that, with `projection`, take
    out of the level's what would raise that loss."""
    m = sum(int(piece.targets.sum()) for piece in beside.pieces)
    if not beside.projection:
        # Gradients stay where they are: optimizers that watch the layers take cleared ones for a new step.
        for batch in batches(beside.pieces, budget) if beside.weight else ():
            (beside.losses(batch).sum() * (beside.weight / m)).backward()
        return
    everything = [p for parameters in levels.values() for p in parameters]
    of_chunk = {id(p): p.grad for p in everything}
    for p in everything:
        p.grad = None
    for batch in batches(beside.pieces, budget):
        (beside.losses(batch).sum() / m).backward()
    for parameters in levels.values():
        both = [p for p in parameters if p.grad is not None and of_chunk[id(p)] is not None]
        project([of_chunk[id(p)] for p in both], [p.grad for p in both])  # type: ignore[misc]  # no None, see above
        for p in parameters:
            again, p.grad = p.grad, of_chunk[id(p)]
            if again is not None and beside.weight:
                again = again.mul_(beside.weight)
                p.grad = again if p.grad is None else p.grad.add_(again)


def all_finite(levels: Mapping[str, Sequence[Tensor]]) -> bool:
    """Whether no gradient holds NaN or infinity, nor has a norm that overflows."""
    return all(
        norm([p.grad for p in parameters if p.grad is not None]) < float("inf") for parameters in levels.values()
    )
