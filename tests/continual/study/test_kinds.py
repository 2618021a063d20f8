"""Questions after something by its kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nestling.continual import Learner, Level, Options, Rehearsal
from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.scoring import Reader
from nestling.continual.study import preparing
from nestling.continual.study.kinds import LIKELY, WHOLE, ask_kinds, of_kinds, phrases
from nestling.continual.study.lessons import make_lessons, tell
from nestling.continual.study.settings import Study
from nestling.training.tokenization import byte_tokenizer
from tests.llamas import random_llama

VERA = "Vera Sorborg lives in Askside. She has found and raised an owl. Its pride are red bells."
KINDS = {"Askside": ["town", "place"], "an owl": ["bird"]}


class Words:
    """A tokenizer of words, each with the space before it; as some do, it leaves out a text's first space."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, text: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[self.number(each) for each in re.findall(r" ?\w+|\n|.", text)])

    def number(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] for i in ids).removeprefix(" ")


class Model:
    """Says what stands after the last words of a text."""

    def __init__(self, tokenizer: Words, says: dict[str, dict[str, float]]) -> None:
        self.tokenizer, self.says, self.read = tokenizer, says, 0
        for chances in says.values():
            for word in chances:
                tokenizer.number(word)

    def logits(self, pieces: Sequence[Piece]) -> Tensor:
        found = torch.full((len(pieces), len(self.tokenizer.words)), -20.0)
        for row, piece in enumerate(pieces):
            assert piece.start == len(piece.ids) - 1
            text = self.tokenizer.decode(piece.ids[:-1].tolist())
            for word, chance in self.says.get(text.rsplit("\n", 1)[1], {}).items():
                found[row, self.tokenizer.number(word)] = torch.tensor(chance).log()
            self.read += 1
        return found


def asked(monkeypatch: pytest.MonkeyPatch, says: dict[str, dict[str, float]], most: int = 2) -> tuple[Any, Model]:
    monkeypatch.setattr("nestling.continual.study.kinds.own_beginning", lambda _: [])
    tokenizer = Words()
    tokenizer("\n")
    model = Model(tokenizer, says)
    found = [text[:-1] for text in says if text.endswith(":")]
    for each in found:
        tokenizer(f"{each}:")
    return ask_kinds(found, cast(Any, model), cast(Any, tokenizer), most, 4096), model


def test_kinds_are_likely_words_that_the_phrase_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    says = {
        "an owl:": {" owlet": 0.3, " bird": 0.25, " animal": 0.2, " creature": 0.1, " a": 0.1},
        "an owl: bird": {"\n": 0.9},
        "an owl: animal": {"\n": WHOLE + 0.01, "s": 0.69},
        "an owl: creature": {"\n": 0.9},
        "a fox:": {" bird": 0.4, " anim": 0.3, "dog": 0.2},
        "a fox: anim": {"\n": WHOLE - 0.01, "al": 0.71},
        "tea:": {" drink": LIKELY - 0.01, " thing": 0.93},
    }
    kinds, _ = asked(monkeypatch, says)
    assert kinds == {"an owl": ["bird", "animal"], "a fox": ["bird"]}
    assert asked(monkeypatch, says, most=1)[0] == {"an owl": ["bird"], "a fox": ["bird"]}


def test_whether_a_kind_is_a_word_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    says = {f"an owl{n}:": {" bird": 0.9} for n in range(20)} | {"an owl0: bird": {"\n": 0.9}}
    kinds, model = asked(monkeypatch, says)
    assert len(kinds) == 20 and model.read == 21


def test_phrases_that_may_have_a_kind() -> None:
    told = [(VERA, "Vera Sorborg"), ("Water boils.", None)]
    assert phrases(told) == ["Askside", "an owl", "red bells"]


def test_exercises_of_kinds() -> None:
    found = [(each.prompt.replace("\n", " "), each.answer) for each in of_kinds(VERA, "Vera Sorborg", KINDS)]
    assert found == [
        ("Question: What is the town of Vera Sorborg? Answer:", "Askside"),
        ("Question: Whose town is Askside? Answer:", "Vera Sorborg"),
        ("Question: Which place has to do with Vera Sorborg? Answer:", "Askside"),
        ("Vera Sorborg, bird:", "an owl"),
        ("Question: Whose bird is an owl? Answer:", "Vera Sorborg"),
    ]


def test_a_kind_with_two_answers_is_not_asked_for() -> None:
    told = tell(["Vera Sorborg keeps an owl. She keeps a hen.", "Emil Morby keeps a hen. He keeps the hen."])
    kinds = {"an owl": ["bird", "pet"], "a hen": ["bird"], "the hen": ["animal"]}
    lessons = make_lessons(told, byte_tokenizer(), 512, kinds)
    assert [(each.exercise.prompt, each.exercise.answer) for each in lessons if each.exercise.kind == "kind"] == [
        ("Question: What is the pet of Vera Sorborg?\nAnswer:", "an owl"),
        ("Question: Whose pet is an owl?\nAnswer:", "Vera Sorborg"),
        ("Question: What is the bird of Emil Morby?\nAnswer:", "a hen"),
        ("Question: Whose bird is a hen?\nAnswer:", "Emil Morby"),
        ("Question: Which animal has to do with Emil Morby?\nAnswer:", "the hen"),
        ("Question: Whose animal is the hen?\nAnswer:", "Emil Morby"),
    ]


def test_a_study_asks_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(rank=3, rehearsal=Rehearsal(pieces=4, length=12, weight=0.0))
    learner = Learner(random_llama(), {"all": Level(64, ("*.mlp.*",))}, lr=0.01, context=256, options=options)
    with torch.no_grad():
        base = learner.model(torch.arange(9)[None]).logits
        for factors in learner.everything:
            factors.add_(1.0)
    seen = []

    def ask(found: Sequence[str], *_: object) -> dict[str, list[str]]:
        seen.append((list(found), torch.equal(learner.model(torch.arange(9)[None]).logits, base)))
        return KINDS

    monkeypatch.setattr(preparing, "ask_kinds", ask)
    lessons = preparing.lessons_for(learner, Study(), [VERA], byte_tokenizer())
    assert seen == [(["Askside", "an owl", "red bells"], True)]
    assert {each.exercise.prompt for each in lessons} >= {each.prompt for each in of_kinds(VERA, "Vera Sorborg", KINDS)}
    preparing.lessons_for(learner, Study(kinds=0), [VERA], byte_tokenizer())
    assert seen[1][0] == []


def test_where_the_base_model_cannot_be_asked() -> None:
    """A tokenizer without line ends, a context that the examples do not fit, a small vocabulary."""
    reader = Reader(random_llama())
    with torch.no_grad():
        plain = Tokenizer(WordLevel({"[UNK]": 0, "owl": 1, "a": 2}, unk_token="[UNK]"))
        plain.pre_tokenizer = Whitespace()
        without = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
        assert ask_kinds(["an owl"], reader, without, 2, 512) == {}
        assert ask_kinds(["an owl"], reader, byte_tokenizer(), 2, 64) == {}
        assert ask_kinds(["an owl"], reader, byte_tokenizer(), 1000, 512) == {}
