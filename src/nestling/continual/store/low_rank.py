"""Small memories: each matrix of a difference by the nearest matrix of a low rank."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestling.continual.store.memory import Memory
from nestling.continual.store.records import LowRank, dot, shape_of
from nestling.errors import UserError


@dataclass(frozen=True)
class Truncation:
    """A memory of limited rank, and what the limit cost.

    Attributes:
        memory: without what only a `Learner` needs.
        energy: kept share of the squared Frobenius norm of all differences together; 1 where nothing was learned.
    """

    memory: Memory
    energy: float


def for_use(memory: Memory) -> Memory:
    """A memory without optimizer states and buffers: for reading, or to begin learning from afresh."""
    return replace(memory, tensors={})


def limit_rank(memory: Memory, rank: int) -> Truncation:
    """Every matrix replaced by its best approximation of a rank (Eckart-Young), unless that takes more room.

    Vectors are kept as they are. The singular vectors come from the eigenvectors of the smaller Gram matrix in float64,
    several times faster than a singular value decomposition; the product with them is a projection, so squaring the
    condition number costs nothing that float32 would show.

    Args:
        memory: dense or of low rank already.
        rank: at least 1.

    Raises:
        UserError: a rank below 1.
    """
    if rank < 1:
        raise UserError(f"rank {rank}: a difference of rank 0 is none; give 1 or more")
    kept = total = 0.0
    limited: dict[str, Tensor | LowRank] = {}
    for name, difference in memory.differences.items():
        energy = dot(difference, difference)
        shape = shape_of(difference)
        current = difference.left.shape[1] if isinstance(difference, LowRank) else min(shape, default=0)
        if len(shape) == 2 and rank < current and rank * sum(shape) < shape[0] * shape[1]:
            limited[name] = low = (
                nearest_of_low(difference, rank) if isinstance(difference, LowRank) else _nearest(difference, rank)
            )
            kept += dot(low, low)
        else:
            limited[name] = difference
            kept += energy
        total += energy
    made = with_ranks(replace(for_use(memory), differences=limited))
    return Truncation(made, min(1.0, kept / total) if total else 1.0)


def with_ranks(memory: Memory) -> Memory:
    """The memory with its learner's ranks set to those of its differences, so that learning can go on from it.

    A level that had a rank and holds full differences now, since it was merged with such, has none any more. A level
    without a rank stays as it is.
    """
    settings = deepcopy(memory.settings)
    learner: dict[str, Any] = settings.get("learner") or {"levels": {}, "options": {"rank": None}}
    of_all, learner["options"]["rank"] = learner["options"]["rank"], None
    for level, values in learner["levels"].items():
        found = [memory.differences.get(name) for name in memory.parameters.get(level, [])]
        there = [d for d in found if d is not None]
        ranks = [d.left.shape[1] for d in there if isinstance(d, LowRank)]
        values["rank"] = values["rank"] or of_all
        if values["rank"] and there:
            values["rank"] = max(ranks) if len(ranks) == len(there) else None
    return replace(memory, settings=settings)


def _nearest(matrix: Tensor, rank: int) -> LowRank:
    """With the singular values shared by both halves, so that neither underflows in half precision."""
    wide = matrix.shape[0] > matrix.shape[1]
    exact = matrix.double().T if wide else matrix.double()
    vectors = torch.linalg.eigh(exact @ exact.T).eigenvectors[:, -rank:].flip(1)
    rows = vectors.T @ exact
    root = rows.norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    left, right = (vectors * root).float(), (rows / root[:, None]).float()
    return LowRank(right.T.contiguous(), left.T.contiguous()) if wide else LowRank(left, right)


def nearest_of_low(difference: LowRank, rank: int) -> LowRank:
    """Of a product, without multiplying it out."""
    q_left, r_left = torch.linalg.qr(difference.left.double())
    q_right, r_right = torch.linalg.qr(difference.right.double().T)
    core = _nearest(r_left @ r_right.T, rank)
    return LowRank((q_left @ core.left.double()).float(), (core.right.double() @ q_right.T).float())
