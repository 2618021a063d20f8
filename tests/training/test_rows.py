"""The order of the data: a function of seed and row number, complete, contiguous where states are carried."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch

from nestling.errors import UserError
from nestling.training.rows import ContiguousRows, StreamedRows, collate

TOKENS = np.arange(1003, dtype=np.int32)


def make_shuffled(**changes: Any) -> Any:
    from nestling.training.rows import ShuffledRows

    return ShuffledRows(**{"tokens": TOKENS, "sequence_length": 10, "total": 400, "seed": 3} | changes)


def make_contiguous(**changes: Any) -> ContiguousRows:
    settings = {"tokens": TOKENS, "sequence_length": 10, "streams": 4, "total": 400, "seed": 3} | changes
    return ContiguousRows(**settings)


@pytest.mark.parametrize("make", [make_shuffled, make_contiguous])
def test_rows_depend_on_seed_and_number_alone(make: Any) -> None:
    first, again, other = make(), make(), make(seed=4)
    order = [7, 399, 0, 123, 7]
    found = [first[i]["input_ids"].tolist() for i in order]
    assert found == [again[i]["input_ids"].tolist() for i in order]
    assert found != [other[i]["input_ids"].tolist() for i in order]
    for i in order:
        assert torch.equal(first[i]["targets"], first[i]["input_ids"] + 1)
    with pytest.raises(IndexError):
        first[400]


def test_an_epoch_reads_every_window_once_and_in_another_order_than_the_next() -> None:
    rows = make_shuffled()
    epochs = [[int(rows[e * rows.windows + i]["input_ids"][0]) for i in range(rows.windows)] for e in range(3)]
    for starts in epochs:
        assert len(set(starts)) == rows.windows == 100
        assert sorted(starts) == list(range(min(starts), min(starts) + 1000, 10))
        assert starts != sorted(starts)
    assert epochs[0] != epochs[1] != epochs[2]


def test_carried_rows_are_contiguous_until_the_streams_end() -> None:
    rows = make_contiguous()
    assert rows.micro_steps == 25
    seen: set[int] = set()
    for row in range(4):
        stream = [rows[micro * 4 + row] for micro in range(25)]
        assert [bool(r["fresh"]) for r in stream] == [True] + [False] * 24
        ids = torch.cat([r["input_ids"] for r in stream])
        assert torch.equal(ids, torch.arange(int(ids[0]), int(ids[0]) + 250))
        assert not seen & set(ids.tolist())
        seen |= set(ids.tolist())
    assert bool(rows[25 * 4]["fresh"])  # the next epoch


def test_carried_rows_start_anew_after_their_tokens() -> None:
    rows = make_contiguous(carry_tokens=30)
    for row in range(4):
        assert [bool(rows[turn * 4 + row]["fresh"]) for turn in range(25)] == [turn % 3 == 0 for turn in range(25)]


def test_short_corpora_are_refused() -> None:
    with pytest.raises(UserError, match=r"1003 tokens, shorter than one sequence \(1101 tokens\)"):
        make_shuffled(sequence_length=1100)
    with pytest.raises(UserError, match="one sequence for each of 4 rows"):
        make_contiguous(sequence_length=300)
    assert len(make_shuffled(sequence_length=1002)) == 400


class Numbers:
    """A stream with the interface of `datasets.IterableDataset`: documents of rising numbers."""

    def __init__(self, count: int) -> None:
        self.count, self.place = count, 0
        self._start = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start, self._start = self._start, 0
        for number in range(start, self.count):
            self.place = number + 1
            yield {"n": number}

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start = state["place"]


def make_streamed(skip: int = 2, count: int = 12) -> StreamedRows:
    def encode(example: dict[str, Any]) -> np.ndarray:
        return np.arange(100 * example["n"], 100 * example["n"] + 7, dtype=np.int32)

    return StreamedRows(Numbers(count), encode, skip, sequence_length=5, rows=3, memory=8)


def test_streamed_rows_read_whole_documents_without_the_held_out_ones() -> None:
    found = list(islice(make_streamed(), 60))
    for row in range(3):
        mine = found[row::3]
        for before, after in pairwise(mine):
            assert int(before["targets"][-1]) == int(after["input_ids"][0])
    assert not {int(i) // 100 for r in found for i in r["input_ids"]} & {0, 1}  # also after the stream began anew
    assert [bool(r["fresh"]) for r in found[:6]] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("micro", [1, 4, 9])
def test_streamed_rows_continue_exactly(micro: int) -> None:
    whole = [r["input_ids"].tolist() for r in islice(make_streamed(), 75)]
    rows = make_streamed()
    iterator = iter(rows)
    for _ in range(3 * micro + 2):  # the loader has read ahead
        next(iterator)
    state = copy.deepcopy(rows.state_dict(micro))
    resumed = make_streamed()
    resumed.load_state_dict(state)
    assert [r["input_ids"].tolist() for r in islice(resumed, 75 - 3 * micro)] == whole[3 * micro :]


def test_streamed_rows_forget_old_positions_and_refuse_an_empty_stream() -> None:
    rows = make_streamed()
    list(islice(rows, 60))
    with pytest.raises(KeyError, match="no longer kept"):
        rows.state_dict(2)
    with pytest.raises(UserError, match="ends inside its validation part"):
        next(iter(make_streamed(skip=12)))


def test_collate_stacks() -> None:
    batch = collate([make_shuffled()[i] for i in range(3)])
    assert batch["input_ids"].shape == batch["targets"].shape == (3, 10)
    assert batch["fresh"].tolist() == [True] * 3
