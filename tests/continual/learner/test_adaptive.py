"""Levels of a learner that choose when to step."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from nestling.continual import Learner, Level, Options
from tests.continual.models import assert_same
from tests.continual.study.test_forgetting import untimed
from tests.llamas import random_llama

TOKENS = torch.randint(3, 250, (640,), generator=torch.Generator().manual_seed(0))
LEVELS = {"fast": Level(32, ("*.0.mlp.*",)), "slow": Level(64, ("*.1.mlp.*",))}


def learner(threshold: float | None = 1.0, chunk: int | None = 8, levels: dict[str, Level] | None = None) -> Learner:
    options = Options(signal_to_noise=threshold, chunk=chunk)
    return Learner(random_llama(), levels or LEVELS, lr=0.01, context=32, options=options)


def test_levels_step_between_two_chunks_and_their_longest_wait() -> None:
    one = learner()
    assert all(math.isnan(period) for period in one.mean_periods.values())
    one.observe(TOKENS)
    for name, longest in (("fast", 32), ("slow", 64)):
        assert 16 <= one.mean_periods[name] <= longest
    eager, lazy = learner(1e-9), learner(1e9)
    for each in (eager, lazy):
        each.observe(TOKENS)
    assert lazy.mean_periods == {"fast": 32.0, "slow": 64.0}
    assert eager.mean_periods["fast"] < one.mean_periods["slow"]


def test_a_ratio_that_is_never_reached_is_the_fixed_period() -> None:
    lazy, fixed = learner(1e9), learner(None)
    for each in (lazy, fixed):
        each.observe(TOKENS)
    ids = TOKENS[None, :20]
    assert torch.equal(lazy.model(ids).logits, fixed.model(ids).logits)
    assert fixed.mean_periods == {"fast": 32.0, "slow": 64.0}


def test_a_level_of_its_own() -> None:
    one = learner(None, levels={"fast": replace(LEVELS["fast"], signal_to_noise=1e-9), "slow": LEVELS["slow"]})
    one.observe(TOKENS)
    assert one.mean_periods["fast"] < 32 and one.mean_periods["slow"] == 64


@pytest.mark.parametrize("stop", [100, 333])
def test_a_memory_goes_on_exactly(stop: int) -> None:
    whole, part = learner(), learner()
    whole.observe(TOKENS[:stop])
    whole.observe(TOKENS[stop:])
    part.observe(TOKENS[:stop])
    again = Learner.restore(random_llama(), part.memory())
    again.observe(TOKENS[stop:])
    assert again.mean_periods == whole.mean_periods
    assert_same(untimed(again.memory()), untimed(whole.memory()))


def test_a_memory_with_damaged_measures_is_refused() -> None:
    one = learner()
    one.observe(TOKENS)
    memory = one.memory()
    for key, value in (("level_signal", None), ("level_updates", -1), ("level_signal", "x")):
        settings = json.loads(json.dumps(memory.settings))
        if value is None:
            del settings["optimizer"]["groups"][0][key]
        else:
            settings["optimizer"]["groups"][0][key] = value
        with pytest.raises(ValueError, match=f"{key}|parameter group"):
            Learner.restore(random_llama(), replace(memory, settings=settings))


def test_periods_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of the chunk, 24"):
        learner(chunk=24)
    with pytest.raises(ValueError, match="give a chunk of 16 tokens or fewer"):
        learner(chunk=None)
    with pytest.raises(ValueError, match="signal_to_noise"):
        Options(signal_to_noise=-1.0)
