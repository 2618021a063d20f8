from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nestling import NestlingForCausalLM
from tests.models.conftest import FEW, FEW_LOOPED, LOOPED, small_model

NEW = 9


def generate(model: NestlingForCausalLM, ids: Tensor | None, **settings: Any) -> Any:
    """Without an end: random weights would choose the end token now and then and cut the comparisons short."""
    model.generation_config.eos_token_id = None
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False} | settings)


def assert_greedy(model: NestlingForCausalLM, text: Tensor) -> None:
    """Each of the last `NEW` tokens is the most probable one after those before it, read without a cache.

    In one call: no logits depend on later tokens (`test_modeling`).
    """
    with torch.no_grad():
        logits = model(text[:, :-1], use_cache=False).logits[:, -NEW:]
    assert torch.equal(text[:, -NEW:], logits.argmax(-1))


@LOOPED
def test_greedy_is_the_argmax_without_a_cache(model: NestlingForCausalLM, ids: Tensor) -> None:
    found = generate(model, ids)
    assert found.shape == (3, 21 + NEW) and torch.equal(found[:, :21], ids)
    assert_greedy(model, found)
    # Random weights may fall into a loop, but not all into one token.
    assert len(found[:, -NEW:].unique()) > NEW // 2


@LOOPED
def test_a_left_padded_batch_equals_single_rows(model: NestlingForCausalLM, ids: Tensor) -> None:
    lengths, time = [21, 3, 12], ids.shape[1]
    mask = (torch.arange(time) >= time - torch.tensor(lengths)[:, None]).long()
    found = generate(model, torch.where(mask == 1, ids, 0), attention_mask=mask)
    for row, n in enumerate(lengths):
        assert_greedy(model, found[row : row + 1, -n - NEW :])
        assert torch.equal(found[row, -n - NEW : -NEW], ids[row, -n:])


@FEW_LOOPED
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams_equal_beams_without_a_cache(model: NestlingForCausalLM, ids: Tensor, settings: dict[str, int]) -> None:
    found = generate(model, ids, **settings)
    assert torch.equal(found, generate(model, ids, use_cache=False, **settings))
    assert len(found) == 3 * settings.get("num_return_sequences", 1)


@FEW
def test_sampling_equals_sampling_without_a_cache(model: NestlingForCausalLM, ids: Tensor) -> None:
    found = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        settings = {"do_sample": True, "top_k": 20, "temperature": 1.5, "num_return_sequences": 2}
        found.append(generate(model, ids, use_cache=use_cache, **settings))
    assert torch.equal(*found)
    assert not torch.equal(found[0][0], found[0][1])


@FEW
def test_a_state_continues_with_new_tokens_only(model: NestlingForCausalLM, ids: Tensor) -> None:
    with torch.no_grad():
        state = model(ids[:, :15]).past_key_values
    kept = state.clone()
    rest = generate(model, ids[:, 15:], past_key_values=state)
    assert torch.equal(rest[:, :6], ids[:, 15:])
    assert_greedy(model, torch.cat((ids[:, :15], rest), 1))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(state.tensors(), kept.tensors(), strict=True))
    short = generate(model, ids[:, 15:], past_key_values=state, attention_mask=torch.ones_like(ids))
    assert torch.equal(short, rest)


@FEW_LOOPED
def test_all_tokens_with_a_state_are_not_read_twice(model: NestlingForCausalLM, ids: Tensor) -> None:
    """The way of transformers: everything from the start, and the cache of its beginning."""
    with torch.no_grad():
        state = model(ids[:, :15]).past_key_values
    out = generate(model, ids, return_dict_in_generate=True)
    assert torch.equal(generate(model, ids, past_key_values=state), out.sequences)
    beams = generate(model, ids, past_key_values=state, num_beams=3)
    assert torch.equal(beams, generate(model, ids, num_beams=3))
    every = torch.ones_like(out.sequences)  # without a mask, transformers leaves out a padding token that was written
    more = generate(model, out.sequences, past_key_values=out.past_key_values, attention_mask=every)
    assert torch.equal(more[:, :-NEW], out.sequences)
    assert_greedy(model, more)


@FEW
def test_all_tokens_of_a_left_padded_batch(model: NestlingForCausalLM, ids: Tensor) -> None:
    mask = (torch.arange(21) >= torch.tensor([[0], [18], [9]])).long()
    options = {"attention_mask": mask, "return_dict_in_generate": True}
    out = generate(model, ids, **options)
    mask = torch.cat((mask, torch.ones(3, NEW, dtype=torch.int64)), 1)
    found = generate(model, out.sequences, past_key_values=out.past_key_values, attention_mask=mask)
    assert torch.equal(found, generate(model, out.sequences, attention_mask=mask))


@FEW
def test_a_text_is_read_a_second_time_when_the_mask_says_so(model: NestlingForCausalLM, ids: Tensor) -> None:
    with torch.no_grad():
        state = model(ids).past_key_values
    again = torch.cat((ids, ids[:, :4]), 1)
    mask = torch.ones(3, 21 + 25, dtype=torch.int64)
    found = generate(model, again, past_key_values=state, attention_mask=mask)
    assert torch.equal(found[:, :25], again)
    assert_greedy(model, torch.cat((ids, found), 1))


def test_what_cannot_be_told_is_refused() -> None:
    model = small_model("hope_linear")
    ids = torch.randint(3, 61, (2, 12))
    state = model(ids[:, :8]).past_key_values
    other = torch.cat((ids[:1], ids[1:].flip(1)))
    for tokens, past, message in [
        (ids[:, :8], state, "has read all of input_ids"),
        (other, state, "some rows of input_ids begin with what their state has read and others do not"),
        (ids, replace(state, digest=None), r"it cannot be told .* an attention_mask of 8 \+ 12 columns"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(model, tokens, past_key_values=past)
    old = replace(state, digest=None)
    short = generate(model, ids[:, 8:], past_key_values=old)  # fewer tokens than were read: they can only be new
    mask = torch.ones(2, 8 + 4, dtype=torch.int64)
    assert torch.equal(short, generate(model, ids[:, 8:], past_key_values=old, attention_mask=mask))


def test_positions_of_the_callers_own_are_refused() -> None:
    model = small_model("hope_linear")
    ids = torch.randint(3, 61, (2, 12))
    plain = torch.arange(12)[None]
    assert torch.equal(generate(model, ids, position_ids=plain), generate(model, ids))
    with pytest.raises(ValueError, match="generate counts positions by itself"):
        generate(model, ids, position_ids=plain + 3)
    with pytest.raises(ValueError, match="prefill_chunk_size is not possible"):
        generate(model, ids, past_key_values=model.init_state(2), prefill_chunk_size=4)


@FEW_LOOPED
def test_a_state_is_repeated_for_beams(model: NestlingForCausalLM, ids: Tensor) -> None:
    with torch.no_grad():
        state = model(ids[:, :15]).past_key_values
    found = generate(model, ids[:, 15:], past_key_values=state, num_beams=3)
    assert torch.equal(found, generate(model, ids, num_beams=3)[:, 15:])
    with pytest.raises(ValueError, match="3 rows and the input 2"):
        generate(model, ids[:2], past_key_values=state)


@FEW_LOOPED
def test_the_state_comes_back(model: NestlingForCausalLM, ids: Tensor) -> None:
    out = generate(model, ids, return_dict_in_generate=True)
    state = out.past_key_values
    assert state.position.tolist() == [21 + NEW - 1] * 3
    assert state.get_seq_length() == 21 + NEW - 1
    last = out.sequences[:, -1:]
    # With a mask: random weights may write the pad token, which transformers would take for padding.
    more = generate(model, last, past_key_values=state, attention_mask=torch.ones_like(last))
    assert_greedy(model, torch.cat((out.sequences, more[:, 1:]), 1))


@FEW
def test_inputs_embeds(model: NestlingForCausalLM, ids: Tensor) -> None:
    found = generate(model, None, inputs_embeds=model.embed_tokens(ids))
    assert_greedy(model, torch.cat((ids, found), 1))


@FEW
def test_assisted_generation_is_refused(model: NestlingForCausalLM, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="stateful"):
        generate(model, ids[:1], assistant_model=model)
