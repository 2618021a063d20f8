"""The scope of what is studied."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nestling.continual import Learner, Level, Options, Rehearsal
from nestling.continual.store.scope import LEAST, Scope
from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.scoring import Reader
from nestling.continual.study import preparing
from nestling.continual.study.cues import COMMON, MOST, OPEN, make_scope
from nestling.continual.study.lessons import make_lessons, spoken, tell, within
from nestling.continual.study.settings import Study
from nestling.continual.study.studying import Events
from nestling.training.tokenization import byte_tokenizer
from tests.llamas import random_llama

TOKENIZER = byte_tokenizer()
PASSAGES = ["Vera Sorborg keeps an owl.", "An owl is a bird."]
OWN = torch.randint(3, 200, (6, 20), generator=torch.Generator().manual_seed(0))


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text).input_ids)


def made(own: torch.Tensor = OWN) -> Scope:
    with torch.no_grad():
        return make_scope(PASSAGES, Reader(random_llama()), TOKENIZER, own)


def test_words_by_passage_with_their_spellings_and_how_rare_they_are() -> None:
    scope = made()
    word = dict(scope.forms)
    vera, owl = word[tuple(ids(" Vera"))], word[tuple(ids(" owl"))]
    assert word[tuple(ids("vera"))] == vera and word[tuple(ids("Owl"))] == owl
    assert vera in scope.passages[0] and vera not in scope.passages[1]
    assert owl in scope.passages[0] and owl in scope.passages[1]
    assert all(COMMON < each <= MOST for each in scope.surprise)


def test_a_words_surprise_is_that_of_its_beginning_and_what_follows() -> None:
    model = random_llama()
    with torch.no_grad():
        said = model(OWN).logits[:, :-1].softmax(-1).mean((0, 1)).log()

        @torch.no_grad()
        def surprise(word: str) -> float:
            tokens = ids(word)
            after = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            return -float(said[tokens[0]]) - sum(float(after[i, t]) for i, t in enumerate(tokens[1:]))

    scope = made()
    word = dict(scope.forms)
    for each in ("is", "a", "an", "owl", "bird"):
        ways = [before + form for before in (" ", "") for form in (each, each.capitalize())]
        wanted = min([MOST, *map(surprise, ways)])
        if wanted <= COMMON:
            assert tuple(ids(each)) not in word
        else:
            assert scope.surprise[word[tuple(ids(each))]] == pytest.approx(wanted, abs=1e-4)


def test_the_models_own_text_does_not_open_it() -> None:
    named = torch.tensor([ids("so Vera Sorborg keeps an owl there"[:20])] * 3)
    own = torch.cat([OWN, named])
    scope = made(own)
    assert scope.threshold > made().threshold == LEAST
    opened = sum(scope.opens(row) < len(row) for row in own.tolist())
    assert opened <= len(own) // OPEN == 0
    many = torch.cat([OWN.repeat(11, 1), named])  # one in 32, and three reach it as well
    assert sum(made(many).opens(row) < 20 for row in many.tolist()) == 0


def test_targets_where_it_speaks() -> None:
    piece = Piece(torch.arange(6), 2, torch.tensor([True, True, False, True]))
    scope = Scope((((2,), 0),), (16.0,), ((0,),), 9.0)
    found = spoken(piece, scope)
    assert found is not None and found.targets.tolist() == [False, True, False, True]
    assert spoken(piece, Scope((((9,), 0),), (16.0,), ((0,),), 9.0)) is None
    lessons = make_lessons(tell(["Vera Sorborg keeps an owl."]), TOKENIZER, 256)
    vera = Scope(tuple({tuple(ids(w)): 0 for w in (" Vera", "Vera")}.items()), (16.0,), ((0,),), 9.0)
    kept = within(lessons, vera)
    assert {each.exercise.kind for each in kept} == {"passage", "gap"}  # "keeps: Vera Sorborg" begins without her
    assert int(kept[0].piece.targets.sum()) == len(ids(" Sorborg keeps an owl."))
    for each in kept[1:]:
        before = next(lesson for lesson in lessons if lesson.exercise == each.exercise)
        assert torch.equal(before.piece.targets, each.piece.targets)


def learner(**more: object) -> Learner:
    options = Options(rank=3, rehearsal=Rehearsal(pieces=4, length=12, weight=0.0))
    return Learner(random_llama(), {"all": Level(64, ("*.mlp.*",))}, lr=0.01, context=256, options=options)


QUICK = Study(rounds=1, batch=4, lr=1e-2)
VERA, EMIL = {"vera": "Vera Sorborg keeps an owl."}, {"emil": "Emil Morby works as a judge."}


def test_what_is_studied_leaves_other_text_as_it_was() -> None:
    one = learner()
    found = one.study(VERA, TOKENIZER, QUICK)
    assert one.scope is not None
    assert (found.exercises, found.left_out) == (5, 0)
    other, own = (torch.tensor([ids(text)]) for text in ("It rains in the old mill.", "See Vera Sorborg here."))
    base = random_llama()
    assert torch.equal(one.model(other).logits, base(other).logits)
    assert not torch.equal(one.model(own).logits, base(own).logits)


def logits(one: Learner, text: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = one.model(torch.tensor([ids(text)])).logits
    return found


def test_another_study_leaves_what_was_studied_as_it_was() -> None:
    one = learner()
    one.study(VERA, TOKENIZER, QUICK)
    scope, said = one.scope, logits(one, "See Vera Sorborg here.")
    one.study(EMIL, TOKENIZER, QUICK)
    assert [each.scope for each in one.earlier.adapters] == [scope] and one.scope != scope
    assert torch.equal(logits(one, "See Vera Sorborg here."), said)
    alone = learner()
    alone.study(EMIL, TOKENIZER, QUICK)
    assert torch.equal(logits(alone, "See Emil Morby here."), logits(one, "See Emil Morby here."))
    both = "See Vera Sorborg and Emil Morby here."
    assert not torch.equal(logits(one, both), logits(alone, both))
    with one.base_weights():
        assert torch.equal(logits(one, both), logits(learner(), both))


def test_a_study_hears_the_earlier_ones() -> None:
    """What it learns stands beside what is said already."""
    one, alone = learner(), learner()
    one.study(VERA, TOKENIZER, QUICK)
    more = {"more": "Vera Sorborg lives in Askside."}
    one.study(more, TOKENIZER, QUICK)
    alone.study(more, TOKENIZER, QUICK)
    pairs = zip(one.everything, alone.everything, strict=True)
    assert any(not torch.equal(own, other) for own, other in pairs)


def test_a_study_that_was_left_is_gone_on_with() -> None:
    one = learner()

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.study(VERA, TOKENIZER, QUICK, Events(step=stop))
    begun = one.scope
    one.study(VERA | EMIL, TOKENIZER, QUICK)
    assert begun is not None and one.scope is not None and not one.earlier.adapters
    assert len(one.scope.passages) == len(begun.passages) + 1
    one.study(EMIL, TOKENIZER, QUICK)
    assert len(one.earlier.adapters) == 1


def test_a_study_that_was_killed_is_gone_on_with() -> None:
    """From what was saved after a round."""
    one, saved = learner(), []
    one.study(VERA, TOKENIZER, QUICK)
    one.study(EMIL, TOKENIZER, replace(QUICK, rounds=3, until=2.0), Events(round=lambda _: saved.append(one.memory())))
    assert [[each["finished"] for each in memory.settings["studies"]] for memory in saved] == [
        [True, False],
        [True, False],
        [True, True],
    ]
    again = Learner.restore(random_llama(), saved[0])
    again.study(EMIL, TOKENIZER, QUICK)
    assert len(again.earlier.adapters) == 1 and [r.name for r in again.log.records][:2] == ["vera", "emil"]
    assert len(one.studies) == 2 and [r.finished for r in one.log.records] == [True, True]


def test_exercises_at_which_an_earlier_adapter_speaks_instead_are_left_out() -> None:
    piece = Piece(torch.tensor([1, 2, 9, 9]), 1, torch.ones(3, dtype=torch.bool))
    own, earlier = (
        Scope((((1,), 0),), (16.0,), ((0,),), 9.0),
        Scope((((1,), 0), ((2,), 1)), (16.0,) * 2, ((0, 1),), 9.0),
    )
    found = spoken(piece, own, [earlier])
    assert found is not None and found.targets.tolist() == [True, False, False]
    assert (
        spoken(piece, own) is not None
        and spoken(replace(piece, start=2, scored=piece.scored[1:]), own, [earlier]) is None
    )


def test_a_study_that_cannot_begin_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one = learner()
    one.study(VERA, TOKENIZER, QUICK)
    said, scope = logits(one, "See Vera Sorborg here."), one.scope

    def fails(*_: object) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr("nestling.continual.study.studying.take_gradients", fails)
    with pytest.raises(RuntimeError, match="no memory left"):
        one.study(EMIL, TOKENIZER, QUICK)
    assert one.scope == scope and not one.earlier.adapters and len(one.studies) == 1
    assert torch.equal(logits(one, "See Vera Sorborg here."), said)


def test_adapters_are_saved_and_gone_on_from() -> None:
    one = learner()
    one.study(VERA, TOKENIZER, QUICK)
    one.study(EMIL, TOKENIZER, QUICK)
    text = "See Vera Sorborg and Emil Morby here."
    memory, said = one.memory(), logits(one, text)
    again = Learner.restore(random_llama(), memory)
    assert torch.equal(logits(again, text), said)
    for each in (one, again):
        each.study({"ada": "Ada Hale plays the harp."}, TOKENIZER, QUICK)
    assert torch.equal(logits(again, "See Ada Hale here."), logits(one, "See Ada Hale here."))
    assert len(again.earlier.adapters) == 2
    with memory.applied(model := random_llama()):
        torch.testing.assert_close(model(torch.tensor([ids(text)])).logits, said, rtol=0, atol=1e-5)
    one.detach()
    assert torch.equal(logits(one, text), logits(learner(), text)) and not one.model._forward_hooks
    one.apply()
    assert torch.equal(logits(one, "See Ada Hale here."), logits(again, "See Ada Hale here."))


def test_what_the_scope_does_not_reach_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    vera = Scope(tuple({tuple(ids(w)): 0 for w in (" Vera", "Vera")}.items()), (16.0,), ((0,),), 9.0)
    monkeypatch.setattr(preparing, "make_scope", lambda *_: vera)
    found = learner().study(VERA, TOKENIZER, QUICK)
    assert (found.exercises, found.left_out) == (3, 2)  # who keeps an owl, and what an owl leads back to
    nobody = replace(vera, forms=(((250,), 0),))
    monkeypatch.setattr(preparing, "make_scope", lambda *_: nobody)
    one = learner()
    with pytest.raises(ValueError, match="rare enough"):
        one.study(VERA, TOKENIZER, QUICK)
    assert one.scope is None and not one.studies


def test_a_memory_goes_on_as_it_was_begun() -> None:
    everywhere = Study(rounds=1, batch=4, lr=1e-2, everywhere=True)
    one = learner()
    one.study(VERA, TOKENIZER, everywhere)
    one.study(EMIL, TOKENIZER, QUICK)
    assert one.scope is None
    read = learner()
    read.observe(torch.arange(5, 90))
    read.study(VERA, TOKENIZER, QUICK)
    assert read.scope is None
    full = Learner(random_llama(), {"all": Level(64, ("*.mlp.*",))}, lr=0.01, context=256)
    full.study(VERA, TOKENIZER, QUICK)
    assert full.scope is None
    scoped = learner()
    scoped.study(VERA, TOKENIZER, QUICK)
    with pytest.raises(ValueError, match="this memory has a scope"):
        scoped.study(EMIL, TOKENIZER, everywhere)
