"""What one user leaves never reaches the next; learning goes on from what was made of memories."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from nestling.continual import Learner, Level, Memory, Options, Replay
from nestling.continual.replay.buffer import ReplayBuffer
from nestling.continual.store.applying import MemoryUseError
from nestling.continual.store.low_rank import limit_rank
from nestling.continual.store.merge import merge
from nestling.continual.store.records import LowRank, dense
from tests.continual.stream.stream_models import copy_of, text, tiny_llama

LEVELS = {"all": Level(8, ("*.mlp.*",))}


def learner_of(model, **options) -> Learner:
    return Learner(model, LEVELS, lr=1e-2, context=16, options=Options(**options))


@pytest.mark.parametrize("rank", [None, 2])
def test_a_forgotten_learner_still_owns_the_model(rank: int | None) -> None:
    model = tiny_llama()
    learner_of(model, rank=rank).observe(text(24))
    gc.collect()
    with pytest.raises(ValueError, match="another learner is attached"):
        learner_of(model)


def test_learners_and_applied_memories_exclude_each_other() -> None:
    model = tiny_llama()
    ann = learner_of(model, rank=2)
    ann.observe(text(24))
    memory = ann.memory()
    with pytest.raises(MemoryUseError, match="a learner is attached"), memory.applied(model):
        pass
    ann.detach()
    with memory.applied(model), pytest.raises(ValueError, match="a memory is applied"):
        learner_of(model)
    learner_of(model)


@pytest.mark.parametrize("rank", [None, 4])
def test_a_memory_without_progress_brings_none_of_the_last_users(rank: int | None) -> None:
    model = tiny_llama()
    learner = learner_of(model, replay=Replay(8), rank=rank)
    learner.observe(text(20, seed=1))
    ann = learner.memory()
    ben = Memory(ann.fingerprint, ann.periods, ann.parameters, {})
    learner.load(ben)
    buffer = learner.component(ReplayBuffer)
    assert buffer is not None and not len(buffer.pieces)
    assert learner.stream.filled == 0 and learner.counters.tokens == 0
    assert not learner.log.records and not learner.optimizer.state_dict()["state"]
    fresh = learner_of(tiny_llama(), replay=Replay(8), rank=rank)
    for each in (learner, fresh):
        each.observe(text(30, seed=2))
    for name, value in copy_of(fresh.model).items():
        assert torch.equal(copy_of(model)[name], value)
    for name, found in fresh.memory().differences.items():
        assert torch.equal(dense(learner.memory().differences[name]), dense(found)), name


def test_a_memory_of_a_lower_rank_brings_no_factors_of_the_last_users() -> None:
    ben = learner_of(tiny_llama(), rank=1)
    ben.observe(text(24, seed=2))
    memory = replace(ben.memory(), tensors={})
    learner, fresh = learner_of(tiny_llama(), rank=4), learner_of(tiny_llama(), rank=4)
    learner.observe(text(40, seed=1))
    for each in (learner, fresh):
        each.load(memory)
        each.observe(text(30, seed=2))
    for name, found in fresh.memory().differences.items():
        assert isinstance(found, LowRank)
        other = learner.memory().differences[name]
        assert isinstance(other, LowRank)
        assert torch.equal(other.left, found.left) and torch.equal(other.right, found.right)


def test_an_impossible_optimizer_leaves_no_hooks() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="unknown optimizer"):
        Learner(model, LEVELS, "nosuch", lr=1e-2, context=16, options=Options(rank=2))
    assert not any(module._forward_hooks for module in model.modules())
    learner_of(model)


def test_learning_goes_on_from_merged_and_exported_low_ranks() -> None:
    memories = []
    for seed in (1, 2):
        learner = learner_of(tiny_llama(), rank=2)
        learner.observe(text(24, seed))
        memories.append(learner.memory())
    for made, rank in ((merge(*memories), 4), (limit_rank(memories[0], 1).memory, 1), (memories[0], 2)):
        model, other = tiny_llama(), tiny_llama()
        restored = Learner.restore(model, made)
        assert restored.settings.levels["all"].rank == rank or rank == 2
        made.apply(other)
        ids = text(12, seed=3)[None]
        torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-6, atol=1e-6)
        restored.observe(text(24, seed=4))
        assert restored.counters.chunks >= 3
