"""Small memories: each matrix of a difference by the nearest matrix of a low rank."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestling.continual.store.adapters import Adapter, put_together
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
    if memory.adapters:
        return _limit_adapters(memory, rank)
    limited, kept, total = _limited(memory.differences, rank)
    made = with_ranks(replace(for_use(memory), differences=limited))
    return Truncation(made, _share(kept, total))


def _limit_adapters(memory: Memory, rank: int) -> Truncation:
    """Each by itself: a rank of their sum would let one speak where another's scope is."""
    found = [_limited(each.differences, rank) for each in memory.adapters]
    parts = [Adapter(each.scope, own) for each, (own, _, _) in zip(memory.adapters, found, strict=True)]  # type: ignore[arg-type]
    differences, adapters = put_together(parts)
    made = replace(for_use(memory), differences=differences, settings=memory.settings | adapters)
    return Truncation(with_ranks(made), _share(sum(kept for _, kept, _ in found), sum(total for *_, total in found)))


def _share(kept: float, total: float) -> float:
    return min(1.0, kept / total) if total else 1.0


def _limited(
    differences: Mapping[str, Tensor | LowRank], rank: int
) -> tuple[dict[str, Tensor | LowRank], float, float]:
    """With the squared norms that are kept, and that there were."""
    kept = total = 0.0
    limited: dict[str, Tensor | LowRank] = {}
    for name, difference in differences.items():
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
    return limited, kept, total


def with_ranks(memory: Memory) -> Memory:
    """The memory with its learner's ranks set to those of its differences, so that learning can go on from it.

    A level that had a rank and holds full differences now, since it was merged with such, has none any more. A level
    without a rank stays as it is. Of adapters the newest is gone on with.
    """
    differences = memory.adapters[-1].differences if memory.adapters else memory.differences
    settings = deepcopy(memory.settings)
    learner: dict[str, Any] = settings.get("learner") or {"levels": {}, "options": {"rank": None}}
    of_all, learner["options"]["rank"] = learner["options"]["rank"], None
    for level, values in learner["levels"].items():
        found = [differences.get(name) for name in memory.parameters.get(level, [])]
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
