"""How `generate` goes on from a state: which of the given tokens the state has read already."""

from __future__ import annotations

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from nestling.models.cache import ModelState
from nestling.models.digest import empty_digest, extend_digest


def tokens_to_read(
    input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None, state: ModelState
) -> Shaped[Tensor, "B T"] | None:
    """The attention mask of what is left to read.

    `input_ids` are either the tokens that come next, or all tokens from the start, those that the state has read
    first; the state's digest tells. Only a text that begins with the very tokens that its state has read, and is meant
    to be read a second time, looks like the other; whoever means that gives an `attention_mask` that covers the state
    too, `[B, tokens read + T]`, which other models of transformers take for new tokens as well. This function is not
    asked then.

    Args:
        input_ids: tokens, padded where the mask is 0.
        attention_mask: `[B, T]`; None for no padding.
        state: what is gone on from, one row per row of `input_ids`.

    Raises:
        ValueError: nothing is left to read; it cannot be told what was read; or some rows hold what was read and some
            do not.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.to(torch.bool)
    position = state.position.to(input_ids.device)
    reads = real & (real.cumsum(1) <= position[:, None])
    enough = real.sum(1) >= position
    begun = position > 0
    if not bool((enough & begun).any()):
        return attention_mask
    if state.digest is None:
        raise ValueError(
            "it cannot be told whether input_ids begin with what the state has read: it comes from version 0.1 or from "
            f"inputs_embeds. If they are new, give an attention_mask of {int(state.position.max())} + "
            f"{input_ids.shape[1]} columns, which covers what was read too; if not, give the new tokens only"
        )
    same = enough & (_digest_of(input_ids, reads) == state.digest.to(input_ids.device)).all(1)
    if not bool((same & begun).any()):
        return attention_mask
    if not bool(same.all()):
        raise ValueError(
            "some rows of input_ids begin with what their state has read and others do not; give all rows the tokens "
            "that come next, or all rows all tokens from the start"
        )
    left = real & ~reads
    if not bool(left.any(1).all()):
        raise ValueError(
            "the state (past_key_values) has read all of input_ids: give the tokens that come next, or all tokens from "
            f"the start with at least one more. To read them a second time, give an attention_mask of "
            f"{int(state.position.max())} + {input_ids.shape[1]} columns"
        )
    return left


def check_plain_positions(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Refuse positions other than those that `generate` counts by itself: it continues one document per row."""
    if position_ids is None:
        return
    if attention_mask is None:
        plain = torch.arange(position_ids.shape[-1], device=position_ids.device).expand_as(position_ids)
        same = torch.equal(position_ids, plain)
    else:
        real = attention_mask != 0
        same = position_ids.shape == real.shape and torch.equal(position_ids[real], (real.cumsum(1) - 1)[real])
    if not same:
        raise ValueError(
            "generate counts positions by itself, from the attention_mask and the state; leave position_ids out"
        )


def repeat_rows(state: ModelState, rows: int) -> ModelState:
    """Every row several times in succession, as `generate` repeats its inputs."""
    if state.batch_size == rows:
        return state
    if rows % state.batch_size:
        raise ValueError(f"the state has {state.batch_size} rows and the input {rows}; select the rows to continue")
    return state.select(torch.arange(state.batch_size).repeat_interleave(rows // state.batch_size))


def _digest_of(input_ids: Tensor, chosen: Tensor) -> Int[Tensor, "B 2"]:
    """Of the chosen tokens of every row, in their order."""
    order = torch.argsort((~chosen).to(torch.int8), dim=1, stable=True)
    return extend_digest(empty_digest(len(input_ids)), input_ids.gather(1, order), chosen.sum(1))
