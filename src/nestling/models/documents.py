"""Where the documents of a batch begin, in every way callers say it: masks, boundaries, indices, position ids.

Whatever is said twice has to agree, and a position that the model cannot give a token is refused: the layers count the
tokens that a document's state has read, and nothing else.
"""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from nestling.layers.sequence import check_state
from nestling.models.cache import ModelState
from nestling.ops.packing import Rows, find_rows


class Packing(TypedDict, total=False):
    """Keywords of a forward pass that say where packed documents begin. All but the first are transformers' names.

    Attributes:
        cu_seqlens: `[N + 1]` boundaries of documents packed in a batch of one row, from 0 to T.
        cu_seq_lens_q: the same.
        cu_seq_lens_k: the same; it may not differ, for a document reads itself.
        max_length_q: the longest document, which the boundaries say too.
        max_length_k: the same.
        seq_idx: `[B, T]`, a number per token; a document begins where it changes.
    """

    cu_seqlens: Tensor | None
    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: int | None
    max_length_k: int | None
    seq_idx: Int[Tensor, "B T"] | None


def find_documents(
    shape: tuple[int, int],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    state: ModelState | None,
    packing: Packing,
) -> Rows | None:
    """The rows the layers run over, None when every token is real and every row of the batch is one document.

    Args:
        shape: `(B, T)` of the input.
        attention_mask: `[B, T]` or longer (then its last T columns count); 1 for real tokens, 0 for padding.
        position_ids: `[T]`, `[1, T]` or `[B, T]`. They count every document's tokens from what its state has read; a
            step other than 1 begins a document. Without a state they may also count the padding.
        state: what the documents go on from.
        packing: boundaries.

    Raises:
        ValueError: a wrong shape, a mask of other values, a state of another number of rows, boundaries or positions
            that contradict each other or that no reading of the documents gives.
        TypeError: a keyword nobody knows.
    """
    if unknown := sorted(packing.keys() - Packing.__annotations__.keys()):
        raise TypeError(f"the model's forward pass has no argument {', '.join(unknown)}")
    mask = None if attention_mask is None else _check_mask(attention_mask, shape)
    positions = None if position_ids is None else _check_shape(position_ids, shape)
    bounds, seq_idx = _boundaries(packing), packing.get("seq_idx")
    if bounds is not None:
        rows = find_rows(shape, mask, bounds)
    elif seq_idx is not None:
        index = seq_idx.to(device="cpu", dtype=torch.int64)
        if tuple(index.shape) != shape:
            raise ValueError(f"seq_idx has shape {tuple(index.shape)}; the input has (batch, time) = {shape}")
        rows = find_rows(shape, mask, starts=F.pad(index.diff(dim=1) != 0, (1, 0), value=True))
    else:
        rows = find_rows(shape, mask)
        if positions is not None and not _counts_slots(positions, state):
            rows = _split_where_positions_restart(positions, mask, rows)
    check_state(state, shape[0] if rows is None else len(rows.lengths))
    if positions is not None:
        _check_positions(positions, rows, state)
    return rows


def _boundaries(packing: Packing) -> Tensor | None:
    """The one `cu_seqlens` that is given under up to three names."""
    names = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
    given = {name: bounds.cpu() for name in names if isinstance(bounds := packing.get(name), Tensor)}
    for name, bounds in given.items():
        if not torch.equal(bounds, next(iter(given.values()))):
            raise ValueError(f"{name} and {next(iter(given))} give documents different boundaries; give one of them")
    return next(iter(given.values()), None)


def _check_mask(mask: Tensor, shape: tuple[int, int]) -> Bool[Tensor, "B T"]:
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be (batch, time), 1 for real tokens and 0 for "
            "padding: which token sees which is not a mask's to say here. Packed documents are told apart by "
            "position_ids or cu_seqlens"
        )
    mask = mask[:, -shape[1] :].cpu()
    real = mask.to(torch.bool)
    if mask.dtype != torch.bool and not torch.equal(mask, real.to(mask.dtype)):
        raise ValueError(
            "attention_mask holds values other than 1 (a real token) and 0 (padding); tell packed documents apart by "
            "position_ids or cu_seqlens"
        )
    return real


def _check_shape(position_ids: Tensor, shape: tuple[int, int]) -> Int[Tensor, "B T"]:
    positions = position_ids.to(device="cpu", dtype=torch.int64)
    positions = positions[None] if positions.dim() == 1 else positions
    if positions.dim() != 2 or positions.shape[0] not in (1, shape[0]) or positions.shape[1] != shape[1]:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; the input has (batch, time) = {shape}, and every "
            "token one position"
        )
    return positions.expand(shape)


def _counts_slots(positions: Tensor, state: ModelState | None) -> bool:
    """Whether the positions are 0 to T - 1 in every row, padding included: they say nothing then."""
    return state is None and torch.equal(positions, torch.arange(positions.shape[1], device="cpu").expand_as(positions))


def _split_where_positions_restart(positions: Tensor, mask: Tensor | None, rows: Rows | None) -> Rows | None:
    """Documents begin where the positions of two real tokens of a row are not one apart."""
    real = positions if rows is None else rows.pack(positions)
    restarts = F.pad(real.diff(dim=1) != 1, (1, 0))
    if rows is not None:
        restarts &= rows.valid
    if not bool(restarts.any()):
        return rows
    shape = (positions.shape[0], positions.shape[1])
    return find_rows(shape, mask, starts=restarts if rows is None else rows.unpack(restarts))


def _check_positions(positions: Tensor, rows: Rows | None, state: ModelState | None) -> None:
    if _counts_slots(positions, state) and (rows is None or len(rows.lengths) == len(positions)):
        return
    found = positions if rows is None else rows.pack(positions)
    read = torch.zeros(len(found), dtype=torch.int64, device="cpu") if state is None else state.position
    expected = read[:, None] + torch.arange(found.shape[1], device="cpu")
    wrong = found != expected
    if rows is not None:
        wrong &= rows.valid
    if bool(wrong.any()):
        row, slot = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"position_ids give token {slot} of document {row} the position {int(found[row, slot])}, where it has read "
            f"{int(expected[row, slot])} tokens before. Positions count the tokens of a document from 0, or from what "
            "its state (past_key_values) has read; leave position_ids out, or restart them at 0 where a document begins"
        )
