"""Many adapters become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nestling.continual import Learner, Level, Options, Rehearsal
from nestling.continual.learner.guards import LearningDivergedError
from nestling.continual.store.scope import Scope
from nestling.continual.stream.chunks import Piece
from nestling.continual.study import sleeping
from nestling.continual.study.dreams import beginnings, dream, helpful
from nestling.continual.study.lessons import make_lessons, tell
from nestling.continual.study.settings import Study
from nestling.continual.study.sleeping import Sleep, sleep
from nestling.continual.study.studying import Events
from nestling.training.tokenization import byte_tokenizer
from tests.llamas import random_llama

TOKENIZER = byte_tokenizer()
QUICK = Study(rounds=8, batch=4, lr=5e-2, preserve=0.01)
TEXTS = {"vera": "Vera Sorborg keeps an owl.", "emil": "Emil Morby works as a judge."}
NIGHT = Sleep(rounds=30, dreams=1, length=12, lr=3e-2, preserve=0.01)
VERA, EMIL, NOBODY = "Vera Sorborg keeps an owl.", "Emil Morby works as a judge.", "It rains in the old mill."


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text).input_ids)


def learner() -> Learner:
    options = Options(rank=3, rehearsal=Rehearsal(pieces=4, length=12, weight=0.0))
    return Learner(random_llama(), {"all": Level(64, ("*.mlp.*",))}, lr=0.01, context=256, options=options)


@pytest.fixture
def studied() -> Learner:
    """Of two studies."""
    one = learner()
    for name, text in TEXTS.items():
        one.study({name: text}, TOKENIZER, QUICK)
    return one


@torch.no_grad()
def logits(one: Learner, text: str) -> Tensor:
    found: Tensor = one.model(torch.tensor([ids(text)])).logits
    return found


def state(one: Learner) -> list[Tensor]:
    return [p.detach().clone() for p in one.everything]


def test_one_adapter_says_what_two_did(studied: Learner) -> None:
    base, before = learner(), {text: logits(studied, text) for text in (VERA, EMIL)}
    scopes = [*(each.scope for each in studied.earlier.adapters), studied.scope]
    slept = sleep(studied, TEXTS, TOKENIZER, NIGHT)
    assert (slept.adapters, slept.dreamt) == (2, 2) and slept.exercises == 10
    assert 0 < slept.after < 0.5 * slept.cleared
    assert not studied.earlier.adapters and studied.scope is not None
    joined = {tokens for tokens, _ in studied.scope.forms}
    assert all(each is not None and {tokens for tokens, _ in each.forms} <= joined for each in scopes)
    for text, said in before.items():
        far, near = (logits(base, text) - said).norm(), (logits(studied, text) - said).norm()
        assert near < 0.85 * far
    assert torch.equal(logits(studied, NOBODY), logits(base, NOBODY))
    memory = studied.memory()
    assert len(memory.adapters) == 1 and memory.settings["studies"][-1]["sleep"]
    again = Learner.restore(random_llama(), memory)
    assert torch.equal(logits(again, VERA), logits(studied, VERA))


def test_the_same_sleep_twice(studied: Learner) -> None:
    memory, generator = studied.memory(), torch.get_rng_state()
    first = sleep(studied, TEXTS, TOKENIZER, replace(NIGHT, rounds=2))
    assert torch.equal(torch.get_rng_state(), generator)
    again = Learner.restore(random_llama(), memory)
    assert replace(sleep(again, TEXTS, TOKENIZER, replace(NIGHT, rounds=2)), seconds=0) == replace(first, seconds=0)
    assert all(torch.equal(a, b) for a, b in zip(state(studied), state(again), strict=True))


def test_without_its_texts_it_dreams(studied: Learner) -> None:
    slept = sleep(studied, {}, TOKENIZER, replace(NIGHT, dreams=3))
    assert slept.exercises == 0 and 0 < slept.dreams == slept.dreamt <= 6 and slept.after < slept.cleared


def test_the_teacher_is_the_model_before(studied: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a step and after the last one."""
    assert studied.scope is not None
    said = logits(studied, f"{VERA} {NOBODY * 2} {EMIL}")
    asked: list[Tensor] = []

    def measured(night: sleeping._Night, _: object) -> float:
        with night._before():
            asked.append(logits(studied, f"{VERA} {NOBODY * 2} {EMIL}"))
        return 1.0

    monkeypatch.setattr(sleeping._Night, "_measured", measured)
    sleep(studied, TEXTS, TOKENIZER, replace(NIGHT, rounds=1))
    assert asked and all(torch.equal(each, said) for each in asked)


def test_dreams_fit_the_context(studied: Learner) -> None:
    with pytest.raises(ValueError, match="do not fit a context of 256"):
        sleep(studied, TEXTS, TOKENIZER, replace(NIGHT, length=250))
    assert len(studied.earlier.adapters) == 1


def test_in_double_precision_it_is_undone_to_the_last_bit() -> None:
    options = Options(rank=3, rehearsal=Rehearsal(pieces=4, length=12, weight=0.0))
    one = Learner(random_llama().double(), {"all": Level(64, ("*.mlp.*",))}, lr=0.01, context=256, options=options)
    for name, text in TEXTS.items():
        one.study({name: text}, TOKENIZER, QUICK)
    values = state(one)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sleep(one, TEXTS, TOKENIZER, NIGHT, stop)
    assert all(torch.equal(a, b) for a, b in zip(state(one), values, strict=True))


@pytest.mark.parametrize("when", ["a step", "the last", "before"])
def test_what_interrupts_it_leaves_everything_as_it_was(
    studied: Learner, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    values, scope, said = state(studied), studied.scope, logits(studied, VERA)
    earlier = studied.earlier.adapters[0]

    def step(number: int, of: int) -> None:
        if when == "a step" or number == of:
            raise KeyboardInterrupt

    if when == "before":
        monkeypatch.setattr(sleeping, "dream", lambda *_: step(1, 1))
    with pytest.raises(KeyboardInterrupt):
        sleep(studied, TEXTS, TOKENIZER, replace(NIGHT, rounds=2), step)
    assert all(torch.equal(a, b) for a, b in zip(state(studied), values, strict=True))
    assert studied.scope == scope and len(studied.earlier.adapters) == 1
    assert torch.equal(studied.earlier.adapters[0].differences["model.layers.0.mlp.up_proj.weight"].left,
                       earlier.differences["model.layers.0.mlp.up_proj.weight"].left)  # fmt: skip
    assert torch.equal(logits(studied, VERA), said) and len(studied.studies) == 2


def test_a_rate_that_is_too_high(studied: Learner) -> None:
    said = logits(studied, VERA)
    with pytest.raises(LearningDivergedError, match="lower rate"):
        sleep(studied, TEXTS, TOKENIZER, replace(NIGHT, rounds=3, lr=1e30))
    assert torch.equal(logits(studied, VERA), said)


def test_what_cannot_sleep() -> None:
    one = learner()
    for name, text in TEXTS.items():
        with pytest.raises(ValueError, match="no two studies"):
            sleep(one, TEXTS, TOKENIZER, NIGHT)
        one.study({name: text}, TOKENIZER, QUICK)
    with pytest.raises(ValueError, match="nothing was studied that could be read again"):
        sleep(one, {}, TOKENIZER, replace(NIGHT, dreams=0))
    assert len(one.earlier.adapters) == 1


def test_a_study_after_sleep_begins_an_adapter(studied: Learner) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studied.study({"ada": "Ada Hale plays the harp."}, TOKENIZER, QUICK, Events(step=stop))
    assert len(studied.earlier.adapters) == 2
    sleep(studied, TEXTS, TOKENIZER, replace(NIGHT, rounds=1))
    slept = state(studied)
    studied.study({"ada": "Ada Hale plays the harp."}, TOKENIZER, QUICK)
    assert len(studied.earlier.adapters) == 1
    own = studied.earlier.adapters[0].differences
    assert all(any(torch.equal(d.left, p) for p in slept) for d in own.values())


def test_how_dreams_begin(studied: Learner) -> None:
    lessons = make_lessons(tell([*TEXTS.values(), "water boils at one hundred degrees"]), TOKENIZER, 256)
    begun = [bytes(i - 3 for i in each).decode() for each in beginnings(lessons, studied.earlier, TOKENIZER)]
    assert begun == ["Vera Sorborg", "Emil Morby", "water boils at"]
    rarest = beginnings([], studied.earlier, TOKENIZER)
    assert len(rarest) == 1 and studied.earlier.adapters[0].scope.highest(rarest[0]) > 9


def test_dreams_are_the_models_own_and_within_the_scope(studied: Learner) -> None:
    assert studied.scope is not None
    starts = [ids("Emil Morby"), ids("It rains on Emil Morby")]
    found = dream(studied, starts, 7, 0, studied.scope)
    for piece, start in zip(found, starts, strict=True):
        assert piece.ids[: len(start)].tolist() == start and piece.start == len(start) and len(piece) == 7
        assert bool(piece.targets.all())
    assert [p.ids.tolist() for p in dream(studied, starts, 7, 0, studied.scope)] == [p.ids.tolist() for p in found]
    assert [p.ids.tolist() for p in dream(studied, starts, 7, 1, studied.scope)] != [p.ids.tolist() for p in found]
    assert dream(studied, starts, 7, 0, Scope((((250,), 0),), (16.0,), ((0,),), 9.0)) == []


def test_dreams_are_kept_where_they_help() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)

    def loss(pieces: Sequence[Piece]) -> Tensor:
        return sum(((weight * p.ids[:2].float()).sum() for p in pieces), torch.zeros(())) / len(pieces)

    def piece(*values: int) -> Piece:
        return Piece(torch.tensor([*values, 0]), 0, torch.ones(3, dtype=torch.bool))

    along, against, across = piece(1, 1), piece(-3, 1), piece(2, -1)
    probes = [piece(1, 0), piece(1, 2)]  # together (1, 1)
    assert helpful([along, against, across], probes, loss, [weight]) == [along, across]
    assert helpful([against], [], loss, [weight]) == [against]
