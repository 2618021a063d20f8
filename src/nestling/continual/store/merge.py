"""Two memories of one base model: how they differ, and one made of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.continual.store.adapters import Adapter, put_together
from nestling.continual.store.low_rank import nearest_of_low, with_ranks
from nestling.continual.store.memory import Memory
from nestling.continual.store.records import DocumentRecord, LowRank, dense, dot, shape_of, tensors_of
from nestling.errors import UserError

Shares = tuple[float, float]
"""How much of each of two differences goes into their merge."""
OTHER_LEVEL = "no level"


class MergeError(UserError, ValueError):
    """Two memories that cannot be compared or made one."""


@dataclass(frozen=True)
class LevelComparison:
    """One level of two memories.

    Attributes:
        level: its name; "no level" for parameters that belong to none.
        norms: Frobenius norm of each memory's difference to the base.
        cosine: between the two differences; NaN where one is zero.
    """

    level: str
    norms: tuple[float, float]
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """Two memories side by side.

    Attributes:
        levels: of both, A's order first.
        only_a: documents that only A has read.
        only_b: documents that only B has read.
    """

    levels: list[LevelComparison]
    only_a: list[DocumentRecord]
    only_b: list[DocumentRecord]


def compare(a: Memory, b: Memory) -> Comparison:
    """Norms and cosine per level, and the documents that only one has read.

    A parameter counts under its level in A, or in B where A has none for it.

    Raises:
        MergeError: memories of different base models.
    """
    _check_base(a, b)
    levels = level_of(b) | level_of(a)
    sums: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for name in (*a.periods, *b.periods)}
    for name in sorted(a.differences.keys() | b.differences.keys()):
        entry = sums.setdefault(levels.get(name, OTHER_LEVEL), [0.0, 0.0, 0.0])
        x, y = a.differences.get(name), b.differences.get(name)
        entry[0] += 0.0 if x is None else dot(x, x)
        entry[1] += 0.0 if y is None else dot(y, y)
        entry[2] += 0.0 if x is None or y is None else dot(x, y)
    compared = [
        LevelComparison(level, (math.sqrt(aa), math.sqrt(bb)), ab / math.sqrt(aa * bb) if aa * bb else math.nan)
        for level, (aa, bb, ab) in sums.items()
    ]
    return Comparison(compared, _not_in(a.documents, b.documents), _not_in(b.documents, a.documents))


def merge(
    a: Memory, b: Memory, weights: Shares | None = None, level_weights: Mapping[str, Shares] | None = None
) -> Memory:
    """A memory whose difference is `weights[0] * A + weights[1] * B`, parameter by parameter.

    Memories that were studied keep their adapters, each times its memory's weight; one that both have stands once, with
    the larger of the two weights. So neither speaks in a text that concerns the other alone.

    The result holds no optimizer state, which has no meaning at the new place: learning goes on from it afresh.
    Settings and periods are A's. Documents are those of both; of one that both have read, the records of the side that
    finished it or read more of it.

    Args:
        a: learned on the same base model as `b`, with the same levels.
        b: the other.
        weights: of the two. (0.5, 0.5) keeps to what both agree on and is right for forks of one memory; (1, 1) adds up
            what was learned apart, and suits memories that learned of different things from the base. None is that for
            adapters, and (0.5, 0.5) for memories that speak everywhere.
        level_weights: other weights for the levels named.

    Raises:
        MergeError: different base models or levels, an unknown level, weights that are not finite, or so large that the
            sum is not.
    """
    _check_base(a, b)
    given = dict(level_weights or {})
    if weights is None:
        weights = (1.0, 1.0) if a.adapters and b.adapters else (0.5, 0.5)
    if {n: sorted(p) for n, p in a.parameters.items()} != {n: sorted(p) for n, p in b.parameters.items()}:
        raise MergeError("the two memories divide the parameters into different levels; merge needs the same levels")
    if unknown := sorted(given.keys() - a.periods.keys()):
        raise MergeError(f"no level {unknown[0]!r}; the levels are: {', '.join(a.periods)}")
    if not all(math.isfinite(w) for pair in (weights, *given.values()) for w in pair):
        raise MergeError("a weight is not a finite number")
    levels = level_of(a)
    shares = {n: given.get(levels.get(n, ""), weights) for n in sorted(a.differences.keys() | b.differences.keys())}
    merged, adapters = _sum(a, b, shares)
    for name, (x, y) in shares.items():
        if not all(bool(torch.isfinite(t).all()) for t in tensors_of(merged[name])):
            raise MergeError(f"the weights {x:g} and {y:g} give values in {name} beyond float32; give less")
    return with_ranks(
        Memory(
            fingerprint=a.fingerprint,
            periods=dict(a.periods),
            parameters={name: list(names) for name, names in a.parameters.items()},
            differences=merged,
            documents=_joined(a.documents, b.documents),
            settings=a.settings | adapters | _of_no_learner(a),
        )
    )


def _sum(a: Memory, b: Memory, shares: Mapping[str, Shares]) -> tuple[dict[str, Tensor | LowRank], dict[str, Any]]:
    """Differences of the merge, and what settings say of its adapters."""
    own, others = a.adapters, b.adapters
    if bool(own) != bool(others):
        raise MergeError(
            "one of the two memories was studied and speaks only where a text names what it was taught, the other one "
            "everywhere; merge memories of one kind"
        )
    if not own:
        pairs = {name: (a.differences.get(name), b.differences.get(name)) for name in shares}
        return {name: _weighted(*pairs[name], share) for name, share in shares.items()}, {}
    if a.differences.keys() != b.differences.keys():
        raise MergeError("the two memories have adapters of different parameters")
    shared = [(x, y) for x in own for y in others if _same(x, y)]
    both = {id(each) for pair in shared for each in pair}
    found = [_times(x, {n: max(s) if id(x) in both else s[0] for n, s in shares.items()}) for x in own]
    found += [_times(y, {n: s[1] for n, s in shares.items()}) for y in others if id(y) not in both]
    return put_together(found)


def _of_no_learner(a: Memory) -> dict[str, Any]:
    """What a merge has read is not read again in the same way."""
    if "counters" not in a.settings:
        return {}
    return {"counters": a.settings["counters"] | {"adopted": 1}, "studies": []}


def _same(x: Adapter, y: Adapter) -> bool:
    """One adapter, to the last bit."""
    if x.scope != y.scope:
        return False
    pairs = [(x.differences[name], y.differences[name]) for name in x.differences]
    return all(torch.equal(p.left, q.left) and torch.equal(p.right, q.right) for p, q in pairs)


def _times(adapter: Adapter, weights: Mapping[str, float]) -> Adapter:
    own = {name: LowRank(weights[name] * d.left, d.right) for name, d in adapter.differences.items()}
    return Adapter(adapter.scope, own)


def level_of(memory: Memory) -> dict[str, str]:
    """The level of every parameter that has one."""
    return {name: level for level, names in memory.parameters.items() for name in names}


def _weighted(x: Tensor | LowRank | None, y: Tensor | LowRank | None, weights: Shares) -> Tensor | LowRank:
    """Two low ranks stay one, of the sum of the ranks."""
    if x is None or y is None:
        only, weight = (y, weights[1]) if x is None else (x, weights[0])
        assert only is not None
        return LowRank(weight * only.left, only.right) if isinstance(only, LowRank) else weight * only
    if isinstance(x, LowRank) and isinstance(y, LowRank):
        left = torch.cat([weights[0] * x.left, weights[1] * y.left], dim=1)
        both = LowRank(left, torch.cat([x.right, y.right]))
        most = min(shape_of(both))
        return both if left.shape[1] <= most else nearest_of_low(both, most)
    return weights[0] * dense(x) + weights[1] * dense(y)


def _check_base(a: Memory, b: Memory) -> None:
    if a.fingerprint != b.fingerprint:
        raise MergeError(
            f"the memories belong to different base models (fingerprints {a.fingerprint} and {b.fingerprint}); what "
            "one learned means nothing to the other's model"
        )
    for name in a.differences.keys() & b.differences.keys():
        if shape_of(a.differences[name]) != shape_of(b.differences[name]):
            raise MergeError(
                f"{name} has shape {shape_of(a.differences[name])} in one memory and {shape_of(b.differences[name])} "
                "in the other"
            )


def _key(document: DocumentRecord) -> str:
    """A stream without a name is known by when it began."""
    return document.digest or document.name or document.started


def _not_in(these: Sequence[DocumentRecord], those: Sequence[DocumentRecord]) -> list[DocumentRecord]:
    known = {_key(d) for d in those}
    return [d for d in these if _key(d) not in known]


def _joined(these: Sequence[DocumentRecord], those: Sequence[DocumentRecord]) -> list[DocumentRecord]:
    """All documents of both, `these` first, each with all the records of the side that has read further."""
    own, other = _by_document(these), _by_document(those)
    further = {key: max(parts, other.get(key, []), key=_read) for key, parts in own.items()}
    rest = {key: parts for key, parts in other.items() if key not in own}
    return [d for parts in (further | rest).values() for d in parts]


def _by_document(records: Sequence[DocumentRecord]) -> dict[str, list[DocumentRecord]]:
    """A document that was left and taken up again has several records, whose tokens add up."""
    found: dict[str, list[DocumentRecord]] = {}
    for record in records:
        found.setdefault(_key(record), []).append(record)
    return found


def _read(parts: Sequence[DocumentRecord]) -> tuple[bool, int]:
    """How far a document was read."""
    return any(d.finished for d in parts), sum(d.tokens for d in parts)
