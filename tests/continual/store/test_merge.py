"""Comparing, merging, limiting ranks and summing up, against plain algebra."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nestling.continual.store.low_rank import limit_rank
from nestling.continual.store.memory import DocumentRecord, LowRank, Memory
from nestling.continual.store.merge import MergeError, compare, merge
from nestling.continual.store.records import dense
from nestling.continual.store.summary import summarize
from nestling.errors import UserError
from tests.continual.models import make_memory
from tests.llamas import random_llama


@pytest.fixture(scope="module")
def pair() -> tuple[Memory, Memory]:
    """Two of one model; B lacks a matrix that A has, and holds a dense one where A's is of low rank."""
    model = random_llama()
    a, b = make_memory(model), make_memory(model, seed=1)
    del b.differences[next(n for n in b.differences if ".1.mlp.up_proj" in n)]
    name = next(n for n, d in b.differences.items() if isinstance(d, LowRank))
    b.differences[name] = dense(b.differences[name])
    return a, b


def flat(memory: Memory, names: list[str]) -> Tensor:
    """The differences of these parameters as one float64 vector, zeros where there is none."""
    shapes = {n: p.shape for n, p in random_llama().named_parameters()}
    parts = [dense(memory.differences[n]) if n in memory.differences else torch.zeros(shapes[n]) for n in names]
    return torch.cat([part.double().flatten() for part in parts])


def test_compare_is_norms_and_cosines(pair: tuple[Memory, Memory]) -> None:
    a, b = pair
    comparison = compare(a, b)
    assert [level.level for level in comparison.levels] == ["fast", "slow"]
    for level in comparison.levels:
        x, y = flat(a, a.parameters[level.level]), flat(b, a.parameters[level.level])
        assert level.norms == pytest.approx((float(x.norm()), float(y.norm())), rel=1e-6)
        assert level.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-5)
    assert [d.digest for d in comparison.only_a] == ["b0"] and [d.digest for d in comparison.only_b] == ["b1"]
    assert compare(a, a).levels[0].cosine == pytest.approx(1)
    assert math.isnan(compare(a, replace(b, differences={})).levels[0].cosine)


def test_merge_is_the_weighted_sum(pair: tuple[Memory, Memory]) -> None:
    a, b = pair
    merged = merge(a, b, (0.25, 2.0), {"fast": (1.0, -0.5)})
    for level, (x, y) in {"slow": (0.25, 2.0), "fast": (1.0, -0.5)}.items():
        names = a.parameters[level]
        torch.testing.assert_close(flat(merged, names), x * flat(a, names) + y * flat(b, names), rtol=0, atol=1e-7)
    assert merged.tensors == {} and merged.periods == a.periods
    assert [d.digest for d in merged.documents] == ["aa", "b0", "b1"]


def test_a_document_that_both_have_read_keeps_the_further_records(pair: tuple[Memory, Memory]) -> None:
    """Records of one document add up: it was left and taken up again."""
    a, b = pair
    name = replace(a.documents[0], tokens=0, finished=False)

    def parts(*tokens: int, finished: bool = False) -> list[DocumentRecord]:
        begun = [replace(name, tokens=n) for n in tokens]
        return [*begun[:-1], replace(begun[-1], finished=finished)]

    for x, y, kept in (
        (parts(512, 100), parts(800), 1),
        (parts(800), parts(512, 100), 0),
        (parts(512), parts(512, 300), 1),
        (parts(900), parts(300, 458, finished=True), 1),
        (parts(512, 100), parts(512, 100), 0),
    ):
        merged = merge(replace(a, documents=x), replace(b, documents=y))
        assert merged.documents == (x, y)[kept]


def test_streams_without_a_name_are_told_apart_by_their_beginning(pair: tuple[Memory, Memory]) -> None:
    a, b = pair
    one = replace(a.documents[0], name="", digest="", started="2026-01-01T00:00:00+00:00")
    fork, other = replace(one, tokens=one.tokens + 5), replace(one, started="2026-01-02T00:00:00+00:00")
    assert merge(replace(a, documents=[one]), replace(b, documents=[fork])).documents == [fork]
    assert merge(replace(a, documents=[one]), replace(b, documents=[other])).documents == [one, other]


def test_low_ranks_stay_low(pair: tuple[Memory, Memory]) -> None:
    a, other = pair[0], make_memory(random_llama(), seed=2)
    name = next(n for n, d in a.differences.items() if isinstance(d, LowRank))
    found = merge(a, other, (0.5, 2.0)).differences[name]
    assert isinstance(found, LowRank) and found.left.shape[1] == 4
    wanted = 0.5 * dense(a.differences[name]) + 2.0 * dense(other.differences[name])
    torch.testing.assert_close(found.dense(), wanted)
    del other.differences[name]
    found = merge(a, other, (0.5, 2.0)).differences[name]
    assert isinstance(found, LowRank)
    torch.testing.assert_close(found.dense(), 0.5 * dense(a.differences[name]))


def test_what_cannot_be_merged(pair: tuple[Memory, Memory]) -> None:
    a, b = pair
    with pytest.raises(MergeError, match="different base models"):
        merge(a, replace(b, fingerprint="0"))
    with pytest.raises(MergeError, match="different base models"):
        compare(a, replace(b, fingerprint="0"))
    with pytest.raises(MergeError, match="different levels"):
        merge(a, replace(b, parameters={"fast": [], "slow": []}))
    with pytest.raises(MergeError, match="no level 'mid'; the levels are: fast, slow"):
        merge(a, b, level_weights={"mid": (1, 1)})
    with pytest.raises(MergeError, match="not a finite number"):
        merge(a, b, (math.nan, 1))
    with pytest.raises(MergeError, match="beyond float32"):
        merge(a, b, level_weights={"slow": (1e39, 1e39)})
    name = next(iter(a.differences))
    with pytest.raises(MergeError, match="in one memory and"):
        merge(a, replace(b, differences={name: torch.zeros(2, 2)}))


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25)])
@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_limit_rank_is_the_truncated_svd(shape: tuple[int, int], size: float) -> None:
    matrix = size * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    vector = size * torch.ones(5)
    memory = Memory("f", {"a": 1}, {"a": ["m", "v"]}, {"m": matrix, "v": vector}, tensors={"t": vector})
    limited = limit_rank(memory, 3)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = limited.memory.differences["m"]
    assert isinstance(found, LowRank) and found.left.shape == (shape[0], 3) and found.right.shape == (3, shape[1])
    wanted = (u[:, :3] * s[:3]) @ v[:3]
    torch.testing.assert_close(found.dense().double(), wanted, rtol=0, atol=float(1e-6 * s[0]))
    torch.testing.assert_close(found.left.norm(dim=0), found.right.norm(dim=1))  # shared, so that neither underflows
    kept, whole = (s[:3] ** 2).sum(), (s**2).sum()
    assert limited.energy == pytest.approx(float((kept + 5 * size**2) / (whole + 5 * size**2)), rel=1e-5)
    assert torch.equal(dense(limited.memory.differences["v"]), vector) and not limited.memory.tensors
    again = limit_rank(limited.memory, 1).memory.differences["m"]
    assert isinstance(again, LowRank) and again.left.shape[1] == 1
    torch.testing.assert_close(again.dense().double(), (u[:, :1] * s[:1]) @ v[:1], rtol=0, atol=float(1e-5 * s[0]))


def test_a_rank_that_saves_nothing_changes_nothing(pair: tuple[Memory, Memory]) -> None:
    limited = limit_rank(pair[0], 30)
    assert limited.energy == 1 and limited.memory.differences == pair[0].differences
    assert limit_rank(Memory("f", {}, {}, {}), 1).energy == 1
    zero = limit_rank(Memory("f", {}, {}, {"m": torch.zeros(9, 9)}), 1)
    assert float(dense(zero.memory.differences["m"]).abs().max()) == 0
    with pytest.raises(UserError, match="rank 0"):
        limit_rank(pair[0], 0)


def test_summary(pair: tuple[Memory, Memory]) -> None:
    b = pair[1]
    b = replace(b, differences=b.differences | {"model.norm.weight": torch.ones(32)})
    summary = summarize(b)
    assert [(level.level, level.period, level.parameters, level.changed) for level in summary.levels] == [
        ("fast", 16, 3, 2),
        ("slow", 64, 3, 3),
        ("no level", None, 1, 1),
    ]
    for level in summary.levels[:2]:
        assert level.norm == pytest.approx(float(flat(b, b.parameters[level.level]).norm()), rel=1e-6)
    assert summary.layers[-1] == pytest.approx(math.sqrt(32))
    assert summary.layers[0] == pytest.approx(summary.levels[1].norm) and list(summary.layers) == [-1, 0, 1]
    assert summary.difference_bytes == 4 * (5 * 32 * 48 + 32)
    assert summary.learner_bytes == sum(t.nbytes for t in b.tensors.values())
