from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from nestling.errors import UserError
from nestling.evaluation.choices import (
    Question,
    ask_last_words,
    ask_questions,
    encode_pair,
    log_likelihoods,
    read_last_words,
    read_questions,
)
from nestling.models import convert
from nestling.training.tokenization import byte_tokenizer
from tests.llamas import random_llama


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return random_llama()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def one_by_one(model: LlamaForCausalLM, prompt: str, continuation: str) -> tuple[float, bool]:
    """A token at a time, without batches."""
    ids = [b + 3 for b in prompt.encode()]
    total, greedy = 0.0, True
    for byte in continuation.encode():
        with torch.no_grad():
            said = model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        total += float(said[byte + 3])
        greedy &= int(said.argmax()) == byte + 3
        ids.append(byte + 3)
    return total, greedy


TEXTS = [("the cat", " sat"), ("a", " b"), ("rain and rain and rain", " falls"), ("x y", " z"), ("the", " end of it")]


@pytest.mark.parametrize("budget", [1, 40, 2048])
@pytest.mark.parametrize("converted", [False, True])
def test_log_likelihoods_as_one_by_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, budget: int, converted: bool
) -> None:
    pairs = [encode_pair(tokenizer, *text) for text in TEXTS]
    found = log_likelihoods(convert(model, {"a": 4}) if converted else model, pairs, budget)
    for (value, greedy), text in zip(found, TEXTS, strict=True):
        expected = one_by_one(model, *text)
        assert value == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]


def test_the_greedy_continuation_is_seen(model: LlamaForCausalLM) -> None:
    prompt = [70, 80, 90]
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 3), do_sample=False, max_new_tokens=4, pad_token_id=0
    )
    after = out[0, 3:].tolist()
    wrong = [*after[:-1], (after[-1] + 1) % 259]
    assert [greedy for _, greedy in log_likelihoods(model, [(prompt, after), (prompt, wrong)])] == [True, False]


def test_accuracy_and_its_normalised_form(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    choices = ("sat", "sat on the mat for long", "b")
    questions = [Question(("the cat",) * 3, choices, gold) for gold in range(3)]
    questions.append(Question(("cat", "a dog"), ("ran", "ran"), 1))
    right = normalised = 0
    for question in questions:
        pairs = list(zip(question.prompts, question.choices, strict=True))
        values = [one_by_one(model, p, f" {c}")[0] for p, c in pairs]
        scaled = [value / len(c) for value, (_, c) in zip(values, pairs, strict=True)]
        right += values.index(max(values)) == question.gold
        normalised += scaled.index(max(scaled)) == question.gold
    scores = ask_questions(model, tokenizer, questions)
    assert (scores.accuracy, scores.normalised, scores.items) == (right / 4, normalised / 4, 4)
    # Among texts of one probability a byte, the shortest is likeliest and the longest is so by character.
    long = ask_questions(model, tokenizer, [Question(("the cat",) * 3, choices, 1)])
    assert (long.accuracy, long.normalised) == (0, 1)


def test_last_words(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [("the cat", "sat"), ("rain", "falls")]
    expected = [one_by_one(model, a, f" {b}") for a, b in texts]
    scores = ask_last_words(model, tokenizer, texts)
    assert scores.loss == pytest.approx(-sum(value for value, _ in expected) / 2, abs=1e-4)
    assert scores.accuracy == sum(greedy for _, greedy in expected) / 2 and scores.items == 2


def test_questions_of_all_forms(tmp_path: Path) -> None:
    rows = [
        {"query": "A man. he", "choices": ["runs.", "is."], "label": 1},
        {"query": "A man. he", "choices": ["runs.", "is."], "gold": 0},
        {"question": "Why?", "choices": {"text": ["so", "thus"], "label": ["1", "2"]}, "answerKey": "2"},
        {"question_stem": "Dogs", "choices": {"text": ["bark", "fly"], "label": ["A", "B"]}, "answerKey": "A"},
        {"goal": "Boil", "sol1": "heat", "sol2": "cool", "label": 0},
        {"context": "C.", "question": "Q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        {"sentence": "The box or bag, _ is big.", "option1": "box", "option2": "bag", "answer": "2"},
    ]
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_questions(file) == [
        Question(("A man. he",) * 2, ("runs.", "is."), 1),
        Question(("A man. he",) * 2, ("runs.", "is."), 0),
        Question(("Question: Why?\nAnswer:",) * 2, ("so", "thus"), 1),
        Question(("Dogs",) * 2, ("bark", "fly"), 0),
        Question(("Question: Boil\nAnswer:",) * 2, ("heat", "cool"), 0),
        Question(("Q: C. Q?\nA:",) * 3, ("a", "b", "c"), 2),
        Question(("The box or bag, box", "The box or bag, bag"), ("is big.",) * 2, 1),
    ]
    assert len(read_questions(file, 3)) == 3


@pytest.mark.parametrize("line", ['{"text": "x"}', '{"query": "q", "choices": ["a"], "label": 1}', "{", "[1]"])
def test_other_lines_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "set.jsonl").write_text(line)
    with pytest.raises(UserError, match="line 1"):
        read_questions(tmp_path / "set.jsonl")


def test_lambada_lines(tmp_path: Path) -> None:
    file = tmp_path / "l.jsonl"
    file.write_text('{"text": "He said it to Shane"}\n{"text": "one"}\n')
    assert read_last_words(file, 1) == [("He said it to", "Shane")]
    with pytest.raises(UserError, match="line 2"):
        read_last_words(file)


def test_nothing_to_ask(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="no questions"):
        ask_questions(model, tokenizer, [])
    with pytest.raises(ValueError, match="pair 1"):
        log_likelihoods(model, [([1], [2]), ([1], [])])
    assert encode_pair(tokenizer, "", "x") == ([tokenizer.bos_token_id], [ord("x") + 3])
