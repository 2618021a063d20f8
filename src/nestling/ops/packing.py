"""Rows: padding and packed documents, reduced to left-aligned rows of real tokens.

Padding on either side, holes, and several documents in one row all become the same thing: N rows that start at slot 0
and have `lengths` real tokens. A layer then knows one case, and a masked token can neither write nor advance a chunk
because it is not there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
    starts: Tensor | None = None,
) -> Rows | None:
    """The rows of a `[B, T]` input, or None when every token is real and every row is one document.

    Args:
        shape: `(B, T)`.
        mask: `[B, T]`, non-zero for real tokens; padding may stand left, right or between.
        cu_seqlens: `[N + 1]` cumulative document lengths, from 0 to T, for a batch of one row.
        starts: `[B, T]` bool on the CPU, True at a document's first real token; every row's first real token is one
            without saying so. For a batch of any number of rows, padded or not.

    Raises:
        ValueError: a mask and `cu_seqlens` are given, or a shape or a boundary is wrong.
    """
    if mask is not None and cu_seqlens is not None:
        raise ValueError("give `mask` or `cu_seqlens`, not both: packed documents have no padding")
    if cu_seqlens is not None:
        return _packed_rows(shape, cu_seqlens)
    if mask is None and starts is None:
        return None
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device="cpu")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"mask has shape {tuple(mask.shape)}; the input has (batch, time) = {tuple(shape)}")
    mask = mask.to(device="cpu", dtype=torch.bool)
    if starts is not None:
        real = mask.flatten().nonzero().flatten()
        begins = (starts | (mask.cumsum(1) == 1)).flatten()[real].nonzero().flatten()
        return _document_rows(shape, real, F.pad(begins, (0, 1), value=len(real)))
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
    falls = bool((bounds.reshape(-1).diff() < 0).any())
    if bounds.dim() != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != time or falls:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the row's length {time}; got {bounds.reshape(-1).tolist()[:8]}"
        )
    return _document_rows(shape, torch.arange(time, device="cpu"), bounds)


def _document_rows(shape: tuple[int, int], real: Tensor, bounds: Tensor) -> Rows:
    """A row per document: `bounds` `[N + 1]` count in `real`, the flat positions of all real tokens in their order."""
    lengths = bounds.diff()
    slots = torch.arange(max(int(lengths.max()), 1), device="cpu")
    index = torch.minimum(bounds[:-1, None] + slots, bounds[1:, None] - 1).clamp_min(0)
    return Rows(lengths, real[index], _valid(lengths, len(slots)), shape)


def _valid(lengths: Tensor, width: int) -> Tensor:
    return torch.arange(width, device="cpu")[None, :] < lengths[:, None]
