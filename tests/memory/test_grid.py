"""Rows at different places in their chunks share chunk boundaries after the shift."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestling.memory.grid import Grid, chunk_spans, shift_rows, unshift_rows


@pytest.mark.parametrize(
    ("start", "end", "chunk", "spans"),
    [
        (0, 8, 4, [(0, 4), (4, 8)]),
        (0, 9, 4, [(0, 4), (4, 8), (8, 9)]),
        (3, 9, 4, [(3, 4), (4, 8), (8, 9)]),
        (5, 7, 4, [(5, 7)]),
        (0, 3, 64, [(0, 3)]),
        (2, 5, 1, [(2, 3), (3, 4), (4, 5)]),
    ],
)
def test_spans_are_cut_at_multiples(start: int, end: int, chunk: int, spans: list[tuple[int, int]]) -> None:
    assert chunk_spans(start, end, chunk) == spans


def test_rows_of_one_phase_need_no_shift() -> None:
    grid = Grid.of(torch.tensor([5, 13]), None, 6, 8)
    assert (grid.phase, grid.slots, grid.offsets) == (5, 11, None)
    assert grid.valid_slots(5, 8, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("position", "lengths"),
    [([5, 4], None), ([5, 13], [6, 2]), ([0, 0], [0, 6])],
    ids=["phases differ", "lengths differ", "a row is empty"],
)
def test_ragged_rows_are_shifted(position: list[int], lengths: list[int] | None) -> None:
    grid = Grid.of(torch.tensor(position), None if lengths is None else torch.tensor(lengths), 6, 8)
    assert grid.offsets is not None and grid.offsets.tolist() == [p % 8 for p in position]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 7)), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_shift_puts_every_token_at_its_position(rows: list[tuple[int, int]], chunk: int) -> None:
    position, lengths = (torch.tensor(t) for t in zip(*rows, strict=True))
    time = 7
    grid = Grid.of(position, lengths, time, chunk)
    x: Tensor = 1.0 + torch.arange(len(rows) * 2 * time).reshape(len(rows), 2, time)
    if grid.offsets is None:
        assert grid.slots == grid.phase + time
        return
    moved = shift_rows(x, grid)
    present = grid.valid_slots(0, grid.slots, torch.device("cpu"))
    assert moved.shape == (len(rows), 2, grid.slots)
    for n, (start, length) in enumerate(rows):
        first = start % chunk
        assert torch.equal(moved[n, :, first : first + length], x[n, :, :length])
        assert moved[n].count_nonzero() == 2 * length
        if present is not None:
            slots = torch.arange(grid.slots)
            assert torch.equal(present[n, 0], (slots >= first) & (slots < first + length))
    back = unshift_rows(moved, grid, time)
    for n, length in enumerate(lengths.tolist()):
        assert torch.equal(back[n, :, :length], x[n, :, :length])
