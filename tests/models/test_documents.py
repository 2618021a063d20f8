"""Packed documents in all the ways that callers of transformers say where they begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from nestling import NestlingForCausalLM
from nestling.models.documents import find_documents
from tests.models.conftest import FEW, small_model

LENGTHS = (5, 1, 7, 8)


def positions(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


@FEW
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
        {"return_position_ids": False, "return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    ],
    ids=str,
)
def test_the_flattening_collator_equals_documents_apart(
    model: NestlingForCausalLM, ids: Tensor, options: dict[str, bool]
) -> None:
    parts = [part.tolist() for part in ids[0].split(LENGTHS)]
    out = model(**DataCollatorWithFlattening(**options)([{"input_ids": part} for part in parts]))
    total = torch.zeros((), dtype=torch.float64)
    for part, logits in zip(parts, out.logits[0].split(LENGTHS), strict=True):
        alone = model(torch.tensor([part]), labels=torch.tensor([part]))
        torch.testing.assert_close(logits, alone.logits[0])
        total = total + alone.loss * (len(part) - 1)
    torch.testing.assert_close(out.loss, total / (21 - len(LENGTHS)))
    assert out.past_key_values.position.tolist() == list(LENGTHS)


def test_documents_packed_in_several_padded_rows(model: NestlingForCausalLM, ids: Tensor) -> None:
    """As TRL packs: rows of documents, right-padded with position 0."""
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    place = torch.cat((positions(9, 12), positions(4, 11, *[1] * 6), positions(21)))
    out = model(ids, attention_mask=mask, position_ids=place, labels=ids)
    assert out.past_key_values.position.tolist() == [9, 12, 4, 11, 21]
    for row, begin, end in [(0, 0, 9), (0, 9, 21), (1, 0, 4), (1, 4, 15), (2, 0, 21)]:
        torch.testing.assert_close(out.logits[row, begin:end], model(ids[row : row + 1, begin:end]).logits[0])


@FEW
def test_plain_positions_change_nothing(preset: str, ids: Tensor) -> None:
    model = small_model(preset).double()
    left = (torch.arange(21) >= torch.tensor([[0], [4], [20]])).long()
    for mask, given in [
        (None, torch.arange(21)),
        (None, torch.arange(21)[None]),
        (None, torch.arange(21).expand(3, 21)),
        (left, torch.arange(21)[None]),
        (left, (left.cumsum(1) - 1).clamp_min(0)),
        (left, (left.cumsum(1) - 1).masked_fill(left == 0, 1)),
    ]:
        out = model(ids, attention_mask=mask, position_ids=given)
        assert torch.equal(out.logits, model(ids, attention_mask=mask).logits)
    state = model(ids[:, :8]).past_key_values
    found = model(ids[:, 8:], past_key_values=state, position_ids=torch.arange(8, 21)).logits
    assert torch.equal(found, model(ids[:, 8:], past_key_values=state).logits)


def test_documents_go_on_from_their_states() -> None:
    model = small_model("hope").double()
    ids = torch.randint(3, 61, (1, 21))
    first = model(ids[:, :9], position_ids=positions(4, 5)).past_key_values
    place = torch.cat((torch.arange(4, 10), torch.arange(5, 11)))
    out = model(ids[:, 9:], position_ids=place, past_key_values=first)
    whole = model(torch.cat((ids[:, :4], ids[:, 9:15]), 1)).logits
    torch.testing.assert_close(out.logits[:, :6], whole[:, 4:])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_ids": torch.arange(5, 26)}, "token 0 of document 0 the position 5, where it has read 0 tokens"),
        ({"position_ids": torch.arange(21).flip(0)}, "the position 20, where it has read 0"),
        ({"position_ids": positions(9, 12) * 2}, "token 0 of document 1 the position 2"),
        (
            {"position_ids": torch.arange(20)},
            r"position_ids has shape \(20,\); the input has \(batch, time\) = \(1, 21",
        ),
        ({"position_ids": positions(21).expand(3, 1, 21)}, "every token one position"),
        ({"position_ids": positions(9, 12), "cu_seqlens": torch.tensor([0, 10, 21])}, "token 9 of document 0"),
        ({"position_ids": positions(21), "cu_seq_lens_q": torch.tensor([0, 10, 21])}, "token 0 of document 1"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 10, 21]), "cu_seq_lens_k": torch.tensor([0, 11, 21])},
            "cu_seq_lens_k and cu_seq_lens_q give documents different boundaries",
        ),
        ({"cu_seqlens": torch.tensor([0, 20])}, "must rise from 0 to the row's length 21"),
        ({"seq_idx": torch.zeros(2, 21)}, r"seq_idx has shape \(2, 21\)"),
        ({"attention_mask": torch.ones(1, 21), "cu_seqlens": torch.tensor([0, 21])}, "not both"),
    ],
    ids=str,
)
def test_contradictions_are_refused(given: dict[str, Any], message: str) -> None:
    mask, places = given.pop("attention_mask", None), given.pop("position_ids", None)
    with pytest.raises(ValueError, match=message):
        find_documents((1, 21), mask, places, None, given)


def test_positions_that_ignore_the_state_are_refused() -> None:
    """They would begin the text anew where the model goes on."""
    model = small_model("hope_linear")
    ids = torch.randint(3, 61, (1, 21))
    state = model(ids[:, :8]).past_key_values
    with pytest.raises(ValueError, match=r"the position 0, where it has read 8 tokens before\. .*past_key_values"):
        model(ids[:, 8:], past_key_values=state, position_ids=torch.arange(13))
    with pytest.raises(ValueError, match="state has 1 rows and the input 2"):
        model(ids[:, 8:], past_key_values=state, position_ids=torch.cat((torch.arange(8, 12), torch.arange(9)))[None])
