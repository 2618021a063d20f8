"""A chunk's gradient: its pieces read with gradients, what is replayed with them, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.continual.guards import SpikeGuard, SurpriseGate
from nestling.continual.pieces import Piece, batches
from nestling.continual.reading import Reader
from nestling.continual.steps import norm, project


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


def add_replay_apart(
    reader: Reader,
    replayed: Sequence[Piece],
    weight: float,
    budget: int,
    levels: Mapping[str, Sequence[Tensor]],
) -> dict[str, float]:
    """Project every level's gradient so that it does not raise the replayed loss; add `weight` times that loss' own.

    Returns:
        what `project` took out of each level.
    """
    everything = [p for parameters in levels.values() for p in parameters]
    of_chunk = {id(p): p.grad for p in everything}
    for p in everything:
        p.grad = None
    m = sum(int(piece.targets.sum()) for piece in replayed)
    for batch in batches(replayed, budget):
        (reader.losses(batch).sum() / m).backward()
    taken = {}
    for name, parameters in levels.items():
        both = [p for p in parameters if p.grad is not None and of_chunk[id(p)] is not None]
        gradients, of_replay = [of_chunk[id(p)] for p in both], [p.grad for p in both]
        taken[name] = project(gradients, of_replay)  # type: ignore[arg-type]  # neither holds None, as asked above
        for p in parameters:
            replay, p.grad = p.grad, of_chunk[id(p)]
            if replay is not None and weight:
                p.grad = replay.mul_(weight) if p.grad is None else p.grad.add_(replay, alpha=weight)
    return taken


def all_finite(levels: Mapping[str, Sequence[Tensor]]) -> bool:
    """Whether no gradient holds NaN or infinity, nor has a norm that overflows."""
    return all(
        norm([p.grad for p in parameters if p.grad is not None]) < float("inf") for parameters in levels.values()
    )
