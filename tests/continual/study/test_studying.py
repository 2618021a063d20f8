"""Texts are studied until they are known."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nestling.continual import Learner, Level, Memory, MemoryStore, Options, Rehearsal
from nestling.continual.learn_documents import Text, learn_text
from nestling.continual.store.texts import text_digest
from nestling.continual.study import preparing, studying
from nestling.continual.study.forgetting import Studying, learn_again, plan_forgetting, save_forgotten
from nestling.continual.study.settings import Study
from nestling.continual.study.studying import Events, Step
from nestling.errors import UserError
from nestling.training.tokenization import byte_tokenizer
from tests.continual.models import assert_same
from tests.continual.stream.stream_models import copy_of, equal
from tests.continual.study.test_forgetting import untimed
from tests.llamas import random_llama

TEXTS = {
    "vera.txt": "Vera Sorborg lives here. She keeps an owl.",
    "emil.txt": "Emil Morby works as a judge.",
    "mill.txt": "The mill of Adam Gorlund turns.",
}
QUICK = Study(rounds=2, batch=4, lr=1e-2)
TOKENIZER = byte_tokenizer()


def learner(rank: int | None = 3, rehearsal: Rehearsal | None = None) -> Learner:
    rehearsal = rehearsal or Rehearsal(pieces=4, length=12, weight=0.0)
    options = Options(rank=rank, rehearsal=rehearsal)
    return Learner(random_llama(), {"all": Level(64, ("*.mlp.*",))}, lr=0.01, context=256, options=options)


def test_what_is_studied_is_known() -> None:
    steps: list[Step] = []
    rounds: list[float] = []
    one = learner(rank=16)
    events = Events(steps.append, lambda studied: rounds.append(studied.known[-1]))
    found = one.study(dict([*TEXTS.items()][:1]), TOKENIZER, Study(rounds=60, until=0.7, lr=2e-2, preserve=0.0), events)
    assert found.finished and found.known[-1] >= 0.7 and len(found.known) < 60 and found.known[0] < 0.2
    assert rounds == found.known and found.steps == len(steps) and found.tokens == sum(each.tokens for each in steps)
    assert steps[-1].left == 0 and steps[-1].round == len(rounds) and steps[-1].loss < 1 < steps[0].loss
    record = one.log.records[-1]
    assert (record.name, record.digest, record.finished) == ("vera.txt", text_digest(TEXTS["vera.txt"]), True)
    assert record.tokens == len(TEXTS["vera.txt"]) and record.loss > 3


def test_the_base_is_left_as_it_was_and_the_memory_goes_on() -> None:
    one = learner()
    base = copy_of(random_llama())
    one.study(TEXTS, TOKENIZER, replace(QUICK, everywhere=True))
    memory = one.memory()
    again = Learner.restore(random_llama(), memory)
    assert_same(untimed(again.memory()), untimed(memory))
    ids = torch.arange(5, 60)[None]
    assert torch.equal(one.model(ids).logits, again.model(ids).logits)
    one.observe(torch.arange(5, 90))
    one.detach()
    assert equal(copy_of(one.model), base)
    for each in (one, again):
        assert not any(hasattr(f.right, "parametrizations") for w in each.weights.values() for f in w.factors.values())


@pytest.mark.parametrize("rank", [3, None])
def test_the_same_again(rank: int | None) -> None:
    found = []
    for _ in range(2):
        one = learner(rank)
        one.study(TEXTS, TOKENIZER, QUICK)
        found.append(untimed(one.memory()))
    assert_same(*found)


def test_what_is_preserved_changes_less() -> None:
    free, held = (Study(rounds=4, batch=4, lr=1e-2, preserve=weight) for weight in (1e-6, 30.0))
    changed = [learner().study(TEXTS, TOKENIZER, settings).changed for settings in (free, held)]
    assert changed[1] < 0.5 * changed[0]
    assert math.isnan(learner(None).study(TEXTS, TOKENIZER, QUICK).changed)
    assert math.isnan(learner().study(TEXTS, TOKENIZER, replace(QUICK, preserve=0.0)).changed)


@pytest.mark.parametrize("rehearsal", [None, Rehearsal(pieces=3, length=12)])
def test_what_is_preserved_is_what_the_base_model_does(
    monkeypatch: pytest.MonkeyPatch, rehearsal: Rehearsal | None
) -> None:
    """Whatever was learned before, and whether the text is written now or not."""
    seen = []

    def look(model: torch.nn.Module, *_: object) -> None:
        seen.append(model(torch.arange(5, 25)[None]).logits.detach())
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "SHAPE", (3, 12))
    monkeypatch.setattr(preparing, "Preservation", look)
    one = Learner(random_llama(), lr=0.01, options=Options(rank=3, rehearsal=rehearsal))
    for weights in one.weights.values():
        for each in weights.learned:
            each.data.add_(0.1)
    with pytest.raises(KeyboardInterrupt):
        one.study(TEXTS, TOKENIZER)
    assert torch.equal(seen[0], random_llama()(torch.arange(5, 25)[None]).logits)
    assert not torch.equal(seen[0], one.model(torch.arange(5, 25)[None]).logits)


def test_an_end_from_outside_keeps_what_was_learned() -> None:
    class End(Exception):
        pass

    def step(step: Step) -> None:
        if step.round == 2:
            raise End

    one = learner()
    with pytest.raises(End):
        one.study(TEXTS, TOKENIZER, QUICK, Events(step=step))
    memory = one.memory()
    assert [(d.tokens, d.finished) for d in memory.documents] == [(0, False)] * 3
    assert not memory.settings["studies"][0]["finished"]
    assert any(bool(d.left.any()) for d in memory.differences.values())
    one.study(TEXTS, TOKENIZER, QUICK)
    assert [d.finished for d in one.log.records].count(True) == 3


def test_what_was_learned_before_is_no_new_document() -> None:
    one = learner()
    text = TEXTS["vera.txt"]
    record = replace(one_record("vera.txt"), name="read.txt")
    learn_text(one, Text(record.name, record.digest, torch.tensor(TOKENIZER(text).input_ids)), 0, None)
    one.study(TEXTS, TOKENIZER, QUICK)
    assert [d.name for d in one.log.records] == ["read.txt", "emil.txt", "mill.txt"]
    assert one.studies[0]["records"] == 1 and one.studies[0]["added"] == 2


def one_record(name: str) -> Text:
    return Text(name, text_digest(TEXTS[name]), torch.tensor(TOKENIZER(TEXTS[name]).input_ids))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("gone", ["vera.txt", "emil.txt"])
def test_forgetting_leaves_the_memory_that_never_studied_it(tmp_path: Path, gone: str, early: bool) -> None:
    """A text read, all three studied, another one studied alone: to the last bit."""

    class End(Exception):
        pass

    def history(place: str, without: str | None) -> MemoryStore:
        store, one = MemoryStore(tmp_path / place), learner()
        store.save(one.memory(), "nothing yet")
        if without != "emil.txt":
            learn_text(one, one_record("emil.txt"), 0, None)
            store.save(one.memory(), "read")
        count = 0

        def step(_: Step) -> None:
            nonlocal count
            count += 1
            if early and count == 3:
                raise End

        texts = {name: text for name, text in TEXTS.items() if name != without}
        with suppress(End):
            one.study(texts, TOKENIZER, QUICK, Events(step=step))
        store.save(one.memory(), "studied")
        one.study({"mill.txt": TEXTS["mill.txt"]}, TOKENIZER, QUICK)
        store.save(one.memory(), "studied again")
        return store

    store, never = history("all", None), history("never", gone)
    plan = plan_forgetting(store, [gone])
    texts = {text_digest(text): text for text in TEXTS.values()}
    assert set(plan.needs.values()) == set(TEXTS) - {gone}
    again = learn_again(
        random_llama(), store, plan, lambda r: one_record(r.name), studied=Studying(TOKENIZER, texts.__getitem__)
    )
    save_forgotten(store, plan, again)
    assert_same(untimed(store.load()), untimed(never.load()))


def test_a_memory_whose_studies_are_damaged_is_refused() -> None:
    one = learner()
    one.study(TEXTS, TOKENIZER, QUICK)
    memory = one.memory()

    def load(**changes: object) -> None:
        studies = [memory.settings["studies"][0] | changes]
        Learner.restore(random_llama(), with_studies(memory, studies))

    for changes in ({"steps": -1}, {"digests": [1]}, {"settings": 3}, {"finished": 1}, {"records": "1"}):
        with pytest.raises(ValueError, match="a study of this memory is none"):
            load(**changes)
    for studies in (3, ["a"]):
        with pytest.raises(ValueError, match="stud"):
            Learner.restore(random_llama(), with_studies(memory, studies))


@pytest.mark.parametrize("wrong", [[{"records": 0}], [], 3])
def test_forgetting_refuses_studies_that_are_none(tmp_path: Path, wrong: object) -> None:
    one = learner()
    one.study(TEXTS, TOKENIZER, QUICK)
    memory = one.memory()
    if not wrong:  # settings of another version
        wrong = [memory.settings["studies"][0] | {"settings": {"nothing": 1}}]
    store = MemoryStore(tmp_path / "memory")
    store.save(with_studies(memory, wrong), "damaged")
    with pytest.raises(UserError, match="does not say how it was studied"):
        plan_forgetting(store, ["vera.txt"])


@pytest.mark.parametrize("rank, lr, highest", [(3, None, 2e-3), (None, None, 3e-4), (3, 0.5, 0.5), (None, 0.5, 0.5)])
def test_full_weights_take_smaller_steps(
    monkeypatch: pytest.MonkeyPatch, rank: int | None, lr: float | None, highest: float
) -> None:
    made: list[torch.optim.AdamW] = []

    def make(*args: Any, **more: Any) -> torch.optim.AdamW:
        made.append(torch.optim.AdamW(*args, **more))
        return made[0]

    rates = []
    monkeypatch.setattr(studying, "AdamW", make)
    learner(rank).study(
        TEXTS, TOKENIZER, Study(rounds=2, lr=lr), Events(step=lambda _: rates.append(made[0].param_groups[0]["lr"]))
    )
    assert 0.5 * highest < max(rates) <= highest


def with_studies(memory: Memory, studies: object) -> Memory:
    return replace(memory, settings=memory.settings | {"studies": studies})


def test_a_memory_of_before_has_no_studies() -> None:
    memory = learner().memory()
    old = replace(memory, settings={name: v for name, v in memory.settings.items() if name != "studies"})
    assert Learner.restore(random_llama(), old).studies == []


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"lr": -1.0}, {"until": 0.0}, {"batch": 0}, {"preserve": -1.0}])
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Study(**wrong)


def test_nothing_to_study_changes_nothing() -> None:
    one = learner()
    before = one.memory()
    with pytest.raises(ValueError, match="no document has a word"):
        one.study({"empty": " "}, TOKENIZER)
    assert_same(one.memory(), before)
    one.detach()
    with pytest.raises(RuntimeError, match="detached"):
        one.study(TEXTS, TOKENIZER)
