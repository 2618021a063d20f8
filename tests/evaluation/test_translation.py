from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from nestling.evaluation.translation import chrf, encode_pairs, score_translations
from nestling.models import convert
from nestling.tasks.translation import Pair, as_text
from nestling.training.tokenization import byte_tokenizer
from tests.llamas import random_llama

EXAMPLES = [Pair("ma go", "he goes"), Pair("tok", "not yet"), Pair("kewe me leng", "a house in the village")]
ASKED = [Pair("ma tok", "not he"), Pair("leng kewe", "village house"), Pair("go", "goes"), Pair("me me me", "in in")]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return random_llama()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def test_pairs_as_a_stream(tokenizer: PreTrainedTokenizerBase) -> None:
    found = encode_pairs(tokenizer, EXAMPLES)
    assert tokenizer.decode(found.ids) == as_text(EXAMPLES)
    assert tokenizer.decode(found.ids[found.answers]) == "".join(f" {p.english}\n" for p in EXAMPLES)
    sizes = [len(as_text([pair])) for pair in EXAMPLES]
    assert found.ends == (sizes[0], sizes[0] + sizes[1], sum(sizes))
    assert len(encode_pairs(tokenizer, EXAMPLES, sizes[0] + sizes[1]).ends) == 2
    assert len(encode_pairs(tokenizer, EXAMPLES, sizes[0] + sizes[1] - 1).ends) == 1
    with pytest.raises(ValueError, match="no pair fits 3"):
        encode_pairs(tokenizer, EXAMPLES, 3)
    for count in range(4):
        wanted = sum(sizes[3 - count :])
        ids, number = found.last(wanted)
        assert (tokenizer.decode(ids), number) == (as_text(EXAMPLES[3 - count :]), count)
        assert found.last(wanted - 1)[1] == max(0, count - 1)
    assert found.last(1000)[1] == 3


@pytest.mark.parametrize(("shown", "batch_size"), [(0, 1), (2, 1), (2, 3), (3, 8)])
def test_as_the_original_model_on_the_whole_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, shown: int, batch_size: int
) -> None:
    prefix, limit = as_text(EXAMPLES[3 - shown :]), 6
    total, count, answers = 0.0, 0, []
    for pair in ASKED:
        ids = torch.tensor(tokenizer(prefix + pair.prompt + pair.answer)["input_ids"])
        start = len(prefix + pair.prompt)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        total += float(F.cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum"))
        count += len(ids) - start
        out = model.generate(
            ids[None, :start],
            attention_mask=torch.ones(1, start),
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=[ord("\n") + 3, 2],
            pad_token_id=0,
        )
        answers.append(tokenizer.decode(out[0, start:], skip_special_tokens=True).split("\n")[0].strip())
    room = max(max(len(p.prompt + p.answer), len(p.prompt) + limit) for p in ASKED)
    found = score_translations(
        convert(model, {"a": 8}),
        tokenizer,
        ASKED,
        encode_pairs(tokenizer, EXAMPLES),
        context=room + len(prefix),
        max_tokens=limit,
        batch_size=batch_size,
    )
    assert found.examples == shown
    assert found.loss == pytest.approx(total / count, abs=1e-4)
    assert found.answers == tuple(answers) and len(set(answers)) > 1
    assert found.chrf == pytest.approx(chrf(answers, [p.english for p in ASKED]))


def test_loss_alone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    examples, converted = encode_pairs(tokenizer, EXAMPLES), convert(model, {"a": 8})
    found = score_translations(converted, tokenizer, ASKED, examples, context=90, max_tokens=4, generate=False)
    both = score_translations(converted, tokenizer, ASKED, examples, context=90, max_tokens=4)
    longer = score_translations(converted, tokenizer, ASKED, examples, context=90, max_tokens=40, generate=False)
    assert (found.examples, longer.examples) == (2, 1)  # an answer needs its room
    assert found.chrf is None and not found.answers and found.loss == pytest.approx(both.loss)
    with pytest.raises(ValueError, match="no pairs"):
        score_translations(converted, tokenizer, [], examples, context=90)


def test_chrf() -> None:
    assert chrf(["the house"], ["the house"]) == pytest.approx(100)
    assert chrf(["xyz"], ["the house"]) == 0
    assert chrf(["the horse", ""], ["the house", "a"]) < chrf(["the horse", "a"], ["the house", "a"])
