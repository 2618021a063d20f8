"""The adapters of a memory: what was studied at one time, with a scope of its own.

A memory that was studied holds differences of low rank only, and is a sum of adapters. Each speaks within its scope.
So what one study teaches is not touched by the next one, and is silent in the texts that concern the other alone. In
the memory's differences the adapters stand side by side, the oldest first:

    left = [left_1, left_2, ...]    right = [right_1; right_2; ...]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.continual.store.records import LowRank
from nestling.continual.store.scope import Scope, scope_from

KEY = "adapters"
"""In a memory's settings."""
Differences = Mapping[str, LowRank]
"""By the parameter's name."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One part of a memory.

    Attributes:
        scope: where it speaks.
        differences: what it says there.
    """

    scope: Scope
    differences: Differences


def adapters_of(settings: Mapping[str, Any], differences: Mapping[str, Tensor | LowRank]) -> tuple[Adapter, ...]:
    """A memory taken apart; nothing where it speaks everywhere.

    Args:
        settings: of the memory.
        differences: of the memory.

    Raises:
        ValueError: the settings hold something else there, or what does not fit the differences.
    """
    kept = settings.get(KEY)
    if kept is None and settings.get("scope") is not None:  # as it was written before there were several
        low = {name: d.left.shape[1] for name, d in differences.items() if isinstance(d, LowRank)}
        kept = [{"scope": settings["scope"], "ranks": low}]
    if kept is None:
        return ()
    if not isinstance(kept, list) or not kept or not all(isinstance(each, dict) for each in kept):
        raise ValueError(f"a memory's adapters are a list, in this one {str(kept)[:80]}")
    scopes = [scope_from(each.get("scope")) for each in kept]
    ranks = [_ranks(each.get("ranks"), differences) for each in kept]
    parts: list[dict[str, LowRank]] = [{} for _ in kept]
    for name, difference in differences.items():
        own = [each[name] for each in ranks]
        if not isinstance(difference, LowRank):
            raise ValueError(
                f"the memory's difference of {name} is none of low rank, which alone can act on some tokens and not on "
                "others"
            )
        if sum(own) != difference.left.shape[1]:
            raise ValueError(
                f"the adapters' ranks of {name}, {own}, are not the difference's {difference.left.shape[1]}"
            )
        halves = zip(difference.left.split(own, dim=1), difference.right.split(own), strict=True)
        for part, (left, right) in zip(parts, halves, strict=True):
            part[name] = LowRank(left, right)
    return tuple(Adapter(scope, part) for scope, part in zip(scopes, parts, strict=True))


def put_together(adapters: Sequence[Adapter]) -> tuple[dict[str, Tensor | LowRank], dict[str, Any]]:
    """Differences and settings that `adapters_of` takes apart.

    Args:
        adapters: of the same parameters, the oldest first.
    """
    differences: dict[str, Tensor | LowRank] = {}
    for name in adapters[0].differences:
        own = [each.differences[name] for each in adapters]
        left = torch.cat([each.left for each in own], dim=1)
        differences[name] = LowRank(left, torch.cat([each.right for each in own]))
    values = [
        {"scope": each.scope.values(), "ranks": {name: d.left.shape[1] for name, d in each.differences.items()}}
        for each in adapters
    ]
    return differences, {KEY: values}


def about(scopes: Sequence[Scope]) -> str:
    """How much some scopes hold, in words."""
    passages, words = sum(len(each.passages) for each in scopes), sum(len(each.surprise) for each in scopes)
    own = "" if len(scopes) == 1 else f", in {len(scopes)} adapters"
    return f"one of its {passages:,} passages by some of {words:,} words{own}"


def _ranks(values: object, differences: Mapping[str, Tensor | LowRank]) -> dict[str, int]:
    if not isinstance(values, dict) or values.keys() != differences.keys():
        raise ValueError("an adapter of the memory has not the parameters that the memory changes")
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in values.values()):
        raise ValueError("the ranks of an adapter are whole numbers, 0 or more")
    return dict(values)
