"""The running mean of the weights, and what is read beside a chunk: what must not leak, drift or be lost."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from nestling.continual import Gate, Learner, LearningWarning, Level, Memory, Options, Rehearsal, Replay
from nestling.continual.learner.weights import exchange
from nestling.optim import NAMES
from tests.continual.stream.stream_models import copy_of, equal, text, tiny_llama

LEVELS = {"fast": Level(8, ("*layers.1.mlp.*",)), "slow": Level(16, ("*layers.0.mlp.*",))}
TAUGHT = Options(average=32, replay=Replay(4, teacher="average"), rehearsal=Rehearsal(2, 6))


def learner_of(options: Options = TAUGHT, optimizer: str = "adamw", model=None) -> Learner:
    return Learner(model or tiny_llama(), LEVELS, optimizer, lr=0.01, context=16, options=options)


def mean_of(learner: Learner) -> dict[str, Tensor]:
    with learner.averaged():
        return copy_of(learner.model)


WATCHING = ("delta_gradient_descent", "generalized_gradient_descent", "oja")


@pytest.mark.parametrize("optimizer", [name for name in NAMES if name not in WATCHING])
def test_what_weighs_nothing_changes_nothing(optimizer: str) -> None:
    plain = learner_of(Options(), optimizer)
    rehearsing = learner_of(Options(rehearsal=Rehearsal(2, 6, weight=0.0)), optimizer)
    taught = learner_of(Options(average=32, replay=Replay(4, weight=0.0, teacher="average")), optimizer)
    for each in (plain, rehearsing, taught):
        each.observe(text(40))
    assert equal(copy_of(plain.model), copy_of(rehearsing.model))
    assert equal(copy_of(plain.model), copy_of(taught.model))


@pytest.mark.parametrize("optimizer", WATCHING)
def test_optimizers_that_watch_layers_take_no_other_passes(optimizer: str) -> None:
    """What a layer sees counts as much for them in a rehearsed piece as in the chunk, whatever its weight."""
    for options in (
        Options(rehearsal=Rehearsal()),
        Options(replay=Replay(projection=True)),
        Options(average=32, replay=Replay(teacher="average")),
    ):
        model = tiny_llama()
        with pytest.raises(ValueError, match="learns from the layers' inputs"):
            Learner(model, LEVELS, optimizer, lr=0.01, context=600, options=options)
        assert not any(module._forward_hooks for module in model.modules())
        Learner(model, LEVELS, lr=0.01, context=600).detach()
    learner_of(Options(average=32, replay=Replay()), optimizer).observe(text(40))


def test_the_weights_come_back_whatever_happens_in_the_block() -> None:
    learner = learner_of()
    learner.observe(text(40))
    live = copy_of(learner.model)
    with pytest.raises(KeyError), learner.averaged():
        raise KeyError
    assert equal(copy_of(learner.model), live)
    with pytest.raises(KeyError), learner.base_weights():
        assert equal(copy_of(learner.model), copy_of(tiny_llama()))
        raise KeyError
    assert equal(copy_of(learner.model), live)
    with learner.averaged(), pytest.raises(RuntimeError, match="leave the block"):
        learner.start_afresh()
    learner.observe(text(8))


def test_values_change_places_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tensor.copy_
    for failing in range(6):
        here, there = [torch.zeros(2) for _ in range(3)], [torch.ones(2) for _ in range(3)]
        calls = iter(range(100))

        def copy(self: Tensor, other: Tensor, calls=calls, failing: int = failing) -> Tensor:
            if next(calls) == failing:
                raise MemoryError
            return real(self, other)

        monkeypatch.setattr(Tensor, "copy_", copy)
        with pytest.raises(MemoryError):
            exchange(here, there)
        monkeypatch.setattr(Tensor, "copy_", real)
        assert not any(t.any() for t in here) and all(t.all() for t in there)


def test_refused_chunks_do_not_move_the_mean_and_those_left_out_do() -> None:
    learner = learner_of(Options(average=32, spike=1.0, patience=9))
    learner.observe(text(16))
    learner.guard.mean = -1e9
    learner.guard.floor = -1e9
    before = mean_of(learner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LearningWarning)
        assert learner.observe(text(8, seed=4)).notes
    assert equal(mean_of(learner), before)
    gated = learner_of(Options(average=32, gate=Gate(by="chunk", threshold=1e9)))
    gated.weights["fast"].learned[0].data += 1.0
    before = mean_of(gated)
    gated.observe(text(8))
    assert not equal(mean_of(gated), before)


def test_consolidation_begins_the_mean_anew() -> None:
    learner = learner_of()
    learner.observe(text(64))
    assert not equal(mean_of(learner), copy_of(learner.model))
    assert learner.consolidate(steps=2).applied
    assert equal(mean_of(learner), copy_of(learner.model))


def test_seeds_and_lengths_are_checked_at_once() -> None:
    for options in ({"rehearsal": Rehearsal()}, {"replay": Replay()}):
        with pytest.raises(ValueError, match="must be 0 or more"):
            Options(seed=-1, **options)
    with pytest.raises(ValueError, match="average is 8 tokens or more"):
        learner_of(Options(average=7))
    with pytest.raises(ValueError, match="needs the running mean"):
        Options(replay=Replay(teacher="average"))
    with pytest.raises(ValueError, match="do not fit a context of 16"):
        learner_of(Options(rehearsal=Rehearsal(length=17)))


def test_the_mean_as_a_memory() -> None:
    learner = learner_of(Options(average=32))
    learner.observe(text(40))
    with learner.averaged():
        memory, expected = learner.memory(), copy_of(learner.model)
    assert not memory.tensors and memory.documents
    learner.detach()
    with memory.applied(learner.model):
        for name, value in copy_of(learner.model).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_a_mean_begins_where_a_memory_has_none_and_is_left_where_nobody_keeps_it() -> None:
    with_mean, without = learner_of(Options(average=32)), learner_of(Options())
    for each in (with_mean, without):
        each.observe(text(40))
    memories = [each.memory() for each in (with_mean, without)]
    with_mean.load(memories[1])
    assert equal(mean_of(with_mean), copy_of(with_mean.model))
    without.load(memories[0])
    for each in (with_mean, without):
        each.observe(text(20))
    assert equal(copy_of(with_mean.model), copy_of(without.model))


@pytest.mark.parametrize(("name", "match"), [("average.0", "running mean"), ("rehearsal", "rehearsed text")])
def test_a_spoiled_mean_or_text_leaves_the_learner_as_it_was(name: str, match: str) -> None:
    ann, ben = learner_of(), learner_of()
    ann.observe(text(40, seed=1))
    ben.observe(text(40, seed=2))
    before, memory = ann.memory(), ben.memory()
    with pytest.raises(ValueError, match=match):
        ann.load(replace(memory, tensors=memory.tensors | {name: memory.tensors[name][:1]}))
    after = ann.memory()
    assert after.settings == before.settings
    assert all(torch.equal(after.tensors[key], value) for key, value in before.tensors.items())


def test_two_users_with_means_do_not_meet() -> None:
    model = tiny_llama()
    base, alone = copy_of(model), {}
    texts = {"ann": text(40, seed=1), "ben": text(40, seed=2)}
    for name, ids in texts.items():
        with learner_of(model=tiny_llama()) as single:
            single.observe(ids)
            alone[name] = copy_of(single.model)
    learner, kept = learner_of(model=model), {}
    fresh = learner.memory()
    for part in (slice(0, 21), slice(21, 40)):
        for name, ids in texts.items():
            learner.load(kept.get(name, fresh))
            learner.observe(ids[part])
            kept[name] = learner.memory()
    learner.detach()
    assert equal(copy_of(model), base)
    for name, memory in kept.items():
        with memory.applied(model):
            for key, value in copy_of(model).items():
                torch.testing.assert_close(value, alone[name][key], msg=f"{name}: {key}")


def test_memories_of_earlier_versions_are_read() -> None:
    learner = learner_of(Options(replay=Replay(4, weight=0.5)))
    learner.observe(text(40))
    memory: Memory = learner.memory()
    settings = json.loads(json.dumps(memory.settings))
    for name in ("average", "rehearsal"):
        del settings["learner"]["options"][name]
    del settings["learner"]["options"]["replay"]["teacher"]
    resumed = Learner.restore(tiny_llama(), replace(memory, settings=settings))
    for each in (learner, resumed):
        each.observe(text(20))
    assert equal(copy_of(learner.model), copy_of(resumed.model))


def test_factories_take_part() -> None:
    levels = {"fast": Level(8, ("*layers.1.mlp.*",), optimizer=partial(torch.optim.SGD, lr=0.1))}
    learner = Learner(tiny_llama(), levels, lr=1.0, context=16, options=TAUGHT)
    learner.observe(text(40))
    assert not equal(mean_of(learner), copy_of(learner.model))
