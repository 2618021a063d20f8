"""Rows: padding and packed documents, reduced to left-aligned rows of real tokens.

Padding on either side, holes, and several documents in one row all become the same thing: N rows that start at slot 0
and have `lengths` real tokens. A layer then knows one case, and a masked token can neither write nor advance a chunk
because it is not there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where the real tokens of a `[B, T]` input stand.

    Attributes:
        lengths: `[N]` int64 on the CPU, real tokens of every row.
        index: `[N, L]` flat positions in `B * T`; slots past a row's length repeat a valid position.
        valid: `[N, L]` bool, True for real tokens.
        shape: `(B, T)` of the input.
    """

    lengths: Int[Tensor, " N"]
    index: Int[Tensor, "N L"]
    valid: Bool[Tensor, "N L"]
    shape: tuple[int, int]

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` to `[N, L, ...]`; slots past a row's length hold zeros."""
        flat = x.reshape(-1, *x.shape[2:])
        rows = flat[self.index.to(x.device)]
        valid = self.valid.to(x.device).reshape(*self.valid.shape, *[1] * (x.dim() - 2))
        return torch.where(valid, rows, torch.zeros((), dtype=x.dtype, device=x.device))

    def unpack(self, y: Tensor) -> Tensor:
        """`[N, L, ...]` to `[B, T, ...]`; padding holds zeros."""
        valid = self.valid.to(y.device)
        flat = y.new_zeros(self.shape[0] * self.shape[1], *y.shape[2:])
        flat = flat.index_put((self.index.to(y.device)[valid],), y[valid])
        return flat.reshape(*self.shape, *y.shape[2:])


def find_rows(
    shape: tuple[int, int],
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Rows | None:
    """The rows of a `[B, T]` input, or None when every token is real and every row is one document.

    Args:
        shape: `(B, T)`.
        mask: `[B, T]`, non-zero for real tokens; padding may stand left, right or between.
        cu_seqlens: `[N + 1]` cumulative document lengths, from 0 to T, for a batch of one row.

    Raises:
        ValueError: both are given, or a shape or a boundary is wrong.
    """
    if mask is not None and cu_seqlens is not None:
        raise ValueError("give `mask` or `cu_seqlens`, not both: packed documents have no padding")
    if cu_seqlens is not None:
        return _packed_rows(shape, cu_seqlens)
    if mask is None:
        return None
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"mask has shape {tuple(mask.shape)}; the input has (batch, time) = {tuple(shape)}")
    mask = mask.to(device="cpu", dtype=torch.bool)
    if bool(mask.all()):
        return None
    batch, time = shape
    lengths = mask.sum(1)
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)[:, : max(int(lengths.max()), 1)]
    index = order + torch.arange(batch, device="cpu")[:, None] * time
    return Rows(lengths, index, _valid(lengths, index.shape[1]), (batch, time))


def _packed_rows(shape: tuple[int, int], cu_seqlens: Tensor) -> Rows:
    batch, time = shape
    if batch != 1:
        raise ValueError(f"cu_seqlens describes one packed row; the batch is {batch}")
    bounds = cu_seqlens.to(device="cpu", dtype=torch.long)
    lengths = bounds.reshape(-1).diff()
    if bounds.dim() != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != time or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the row's length {time}; got {bounds.reshape(-1).tolist()[:8]}"
        )
    slots = torch.arange(max(int(lengths.max()), 1), device="cpu")
    index = torch.minimum(bounds[:-1, None] + slots, bounds[1:, None] - 1).clamp_min(0)
    return Rows(lengths, index, _valid(lengths, len(slots)), (1, time))


def _valid(lengths: Tensor, width: int) -> Tensor:
    return torch.arange(width, device="cpu")[None, :] < lengths[:, None]
