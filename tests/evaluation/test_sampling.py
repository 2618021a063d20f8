"""Continuing a text: the same as `generate`, the state has seen all of it, and the text reads as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from nestling import NestlingForCausalLM, presets
from nestling.evaluation.sampling import _choose, continue_text, decode_continuation, end_of_turn, end_tokens
from nestling.training.tokenization import byte_tokenizer
from tests.models.pretrained import tiny_tokenizer
from tests.talkers import CHAT, answering, byte_fallback, sentence

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
    stops = {whole[3], whole[5]}
    seen: list[int] = []
    written, state = continue_text(model, PROMPT, 20, temperature=0, stop=stops, on_token=seen.append)
    assert written == seen == whole[: min(whole.index(stop) for stop in stops)]
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


def test_a_model_without_a_state_reads_everything_again() -> None:
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    written, state = continue_text(mamba, PROMPT, 6, temperature=0)
    expected = mamba.generate(torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert written == expected[0, 4:].tolist() and state is None


@pytest.mark.parametrize(
    ("named", "template", "ends"),
    [
        (None, None, {1}),
        (1, None, {1}),
        (2, None, {1, 2}),
        ([1, 2], None, {1, 2}),
        (None, CHAT, {1, 2}),
        ([1], CHAT, {1, 2}),
    ],
)
def test_every_token_that_ends_a_text(named: Any, template: str | None, ends: set[int]) -> None:
    model, tokenizer = answering()
    model.generation_config.eos_token_id, tokenizer.chat_template = named, template
    assert end_tokens(model, tokenizer) == ends


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}<user> {{ m.content }} {{ '<end_of_turn>' }}\n{% endfor %}", 2),
        ("{% for m in messages %}{{ m.content }} <end_of_text>{% endfor %}", 1),
        ("{% for m in messages %}<user> {{ m.content }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }} good <end_of_turn> {% endfor %}", None),
        ("{{ messages[0].content }}", None),
        ("{{ raise_exception('one turn only') }}", None),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes_after_an_answer(template: str, end: int | None) -> None:
    tokenizer = answering()[1]
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == end
    assert end_of_turn(byte_tokenizer()) is None


TEXTS = ["The capital is Paris of course", "so a", "  so  so", "a\N{EURO SIGN}\N{EURO SIGN} \N{GRINNING FACE}a so a"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [byte_tokenizer, tiny_tokenizer, byte_fallback, lambda: sentence()[1]])
def test_a_text_told_token_by_token_reads_as_the_whole(make: Any, text: str) -> None:
    """Wherever the prompt ends, in the middle of a character too."""
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for cut in range(len(ids)):
        before = tokenizer.decode(ids[:cut], skip_special_tokens=True) if cut else ""
        assert decode_continuation(tokenizer, ids[:cut], ids[cut:]) == whole[len(before) :]
