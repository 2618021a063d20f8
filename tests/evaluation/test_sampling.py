"""Continuing a text: the same as `generate`, and the state has seen all of it."""

from __future__ import annotations

import pytest
import torch

from nestling import NestlingForCausalLM, presets
from nestling.evaluation.sampling import _choose, continue_text

PROMPT = [1, 70, 80, 90]


@pytest.fixture(scope="module")
def model() -> NestlingForCausalLM:
    torch.manual_seed(0)
    return NestlingForCausalLM(presets.hope(hidden_size=16, num_layers=2, num_heads=1))


def test_greedy_equals_generate(model: NestlingForCausalLM) -> None:
    written, state = continue_text(model, PROMPT, 12, temperature=0)
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert written == expected[0, 4:].tolist()
    assert state.get_seq_length() == 16


def test_state_goes_on_where_the_text_ended(model: NestlingForCausalLM) -> None:
    whole, _ = continue_text(model, PROMPT, 20, temperature=0)
    first, state = continue_text(model, PROMPT, 8, temperature=0)
    rest, _ = continue_text(model, whole[8:9], 11, temperature=0, state=state)
    assert first + whole[8:9] + rest == whole
    _, read = continue_text(model, PROMPT + first, 0)  # writes nothing, reads everything
    for (name, a), (_, b) in zip(read.tensors(), state.tensors(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


def test_sampling_follows_the_seed_alone(model: NestlingForCausalLM) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, _ = continue_text(model, PROMPT, 20, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert continue_text(model, PROMPT, 20, seed=1)[0] == a
    assert continue_text(model, PROMPT, 20, seed=2)[0] != a


def test_stop_token_is_neither_written_nor_read(model: NestlingForCausalLM) -> None:
    whole, _ = continue_text(model, PROMPT, 20, temperature=0)
    stop = whole[3]
    seen: list[int] = []
    written, state = continue_text(model, PROMPT, 20, temperature=0, stop_token=stop, on_token=seen.append)
    assert written == seen == whole[: whole.index(stop)]
    assert state.get_seq_length() == len(PROMPT) + len(written)


def test_choice_keeps_to_the_nucleus_and_the_allowed_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = {_choose(logits.clone(), 1.0, 0.7, generator, ()) for _ in range(200)}
    assert drawn == {0, 1}
    assert {_choose(logits.clone(), 1.0, 0.7, generator, (0,)) for _ in range(200)} == {1, 2}
    assert {_choose(logits.clone(), 1.0, 1e-9, generator, ()) for _ in range(20)} == {0}
    counts = torch.bincount(torch.tensor([_choose(logits.clone(), 2.0, 1.0, generator, ()) for _ in range(4000)]))
    expected = logits[0].div(2).softmax(-1)
    torch.testing.assert_close(counts / 4000, expected, atol=0.03, rtol=0)


def test_bad_arguments(model: NestlingForCausalLM) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        continue_text(model, [], 3)
    with pytest.raises(ValueError, match="top_p in"):
        continue_text(model, PROMPT, 3, top_p=0.0)
