"""Where rows stand in their chunks.

Rows of a batch may have read different numbers of tokens, so their chunks end at different tokens. A `Grid` shifts
every row to its phase: slot s of the grid has position s modulo the chunk for all rows, and chunk boundaries agree.
When all rows have one phase and no padding nothing is shifted and no token is masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nestling.memory.bank import BankState


@dataclass(frozen=True)
class Grid:
    """Slots of one call.

    Attributes:
        phase: first slot that holds a token when nothing is shifted, else 0.
        slots: end of the last slot.
        offsets: `[N]` first slot of every row, on the CPU; None when all are `phase` and all rows are full.
        ends: `[N]` slot after the last token of every row; None with `offsets`.
    """

    phase: int
    slots: int
    offsets: Tensor | None = None
    ends: Tensor | None = None

    @staticmethod
    def of(position: Tensor, lengths: Tensor | None, time: int, chunk: int) -> Grid:
        """The grid for rows that have read `position` tokens and now read `lengths` (all `time` if None)."""
        phases = position % chunk
        first = int(phases[0])
        if lengths is None and bool((phases == first).all()):
            return Grid(first, first + time)
        ends = phases + (time if lengths is None else lengths)
        return Grid(0, max(int(ends.max()), 1), phases, ends)

    def valid_slots(self, start: int, end: int, device: torch.device) -> Tensor | None:
        """`[N, 1, end - start]`, True where a token stands; None when all slots hold one."""
        if self.offsets is None or self.ends is None:
            return None
        slots = torch.arange(start, end, device="cpu")
        valid = (slots >= self.offsets[:, None]) & (slots < self.ends[:, None])
        return None if bool(valid.all()) else valid[:, None].to(device)

    def where_crossed(self, end: int, new: Tensor, old: Tensor) -> Tensor:
        """`new` in the rows that cross the boundary at slot `end` in this call, `old` in the others."""
        if self.offsets is None or self.ends is None:
            return new
        # A row that enters after this boundary crossed it in an earlier call.
        crossed = (self.offsets < end) & (self.ends >= end)
        if bool(crossed.all()):
            return new
        return torch.where(crossed.to(new.device).reshape(-1, *[1] * (new.dim() - 1)), new, old)

    def cross(self, state: BankState, end: int, chunk: int) -> BankState:
        """At a chunk boundary the running weights become the next chunk's start, in rows that have reached it."""
        if end % chunk:
            return state
        pairs = zip(state.running, state.start, strict=True)
        return BankState([self.where_crossed(end, new, old) for new, old in pairs], state.running, state.surprise)


def chunk_spans(start: int, end: int, chunk: int) -> list[tuple[int, int]]:
    """`[start, end)` cut at the multiples of `chunk`."""
    cuts = [start, *range(start - start % chunk + chunk, end, chunk), end]
    return [(a, b) for a, b in pairwise(cuts) if b > a]


def shift_rows(x: Tensor, grid: Grid) -> Tensor:
    """`[N, H, L, ...]` left-aligned rows to `[N, H, slots, ...]`; slots without a token hold zeros."""
    assert grid.offsets is not None and grid.ends is not None
    slots = torch.arange(grid.slots, device="cpu")
    index = (slots - grid.offsets[:, None]).clamp(0, x.shape[2] - 1)
    valid = (slots >= grid.offsets[:, None]) & (slots < grid.ends[:, None])
    moved = _gather(x, index)
    return moved * valid.to(x.device).reshape(len(valid), 1, -1, *[1] * (x.dim() - 3))


def unshift_rows(y: Tensor, grid: Grid, time: int) -> Tensor:
    """`[N, H, slots, ...]` back to `[N, H, time, ...]`."""
    assert grid.offsets is not None
    index = (torch.arange(time, device="cpu") + grid.offsets[:, None]).clamp_max(grid.slots - 1)
    return _gather(y, index)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    shape = (index.shape[0], 1, index.shape[1], *[1] * (x.dim() - 3))
    return x.gather(2, index.to(x.device).reshape(shape).expand(-1, x.shape[1], -1, *x.shape[3:]))
