from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from nestling.continual.learner.learner import Learner
from nestling.continual.learner.options import Gate, Level, Options, Rehearsal, Replay, UpdateLimit
from nestling.continual.store.applying import MemoryUseError
from nestling.continual.store.memory import LowRank, Memory
from nestling.optim import NAMES
from tests.continual.stream.stream_models import copy_of, text, tiny_llama

TOP, BOTTOM = "*layers.1.mlp.*", "*layers.0.mlp.*"
EVERYTHING = Options(
    retention=0.95,
    limit=UpdateLimit(relative=0.01, absolute=0.5),
    gate=Gate(quantile=0.2, window=30),
    replay=Replay(4, 2, 0.5, projection=True, teacher="average"),
    average=20,
    rehearsal=Rehearsal(2, 5),
    piece=3,
)


def everything(dtype: torch.dtype = torch.float32, options: Options = EVERYTHING, optimizer: str = "adamw") -> Learner:
    levels = {
        "fast": Level(6, (TOP,)),
        "mid": Level(12, ("*q_proj*", "*o_proj*"), rank=2),
        "slow": Level(18, (BOTTOM,)),
    }
    return Learner(tiny_llama(dtype=dtype), levels, optimizer, lr=0.01, context=7, options=options)


def through_json(memory: Memory) -> Memory:
    """As a file would give it back."""
    return replace(memory, settings=json.loads(json.dumps(memory.settings, allow_nan=False)))


def same(a: Learner, b: Learner, skip: tuple[str, ...] = ()) -> None:
    """Equal to the last bit: weights, tensors and settings."""
    one, other = a.memory(), b.memory()
    for name, p in a.model.named_parameters():
        assert torch.equal(p, dict(b.model.named_parameters())[name]), name
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())
    assert one.settings == other.settings
    assert one.documents == other.documents
    assert one.differences.keys() == other.differences.keys()


@pytest.mark.parametrize("cut", [1, 40, 54, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resumes_to_the_bit_with_every_option(cut: int, dtype: torch.dtype) -> None:
    """In the middle of a document, of a chunk and of a slow level's period, and at their borders."""
    ids = text(90)
    learner = everything(dtype)
    learner.observe(ids[:20])
    learner.end_document()
    learner.observe(ids[20:cut] if cut > 20 else ids[:1])
    memory = through_json(learner.memory())
    resumed = Learner.restore(tiny_llama(dtype=dtype), memory)
    same(learner, resumed)
    for part in (ids[cut : cut + 7], ids[cut + 7 :]):
        mine, other = learner.observe(part), resumed.observe(part)
        assert torch.equal(mine.losses.nan_to_num(), other.losses.nan_to_num())
        assert mine.updated == other.updated
    same(learner, resumed)
    assert learner.counters.chunks > 10 or cut > 60


@pytest.mark.parametrize("optimizer", NAMES)
def test_every_optimizer_resumes_to_the_bit(optimizer: str) -> None:
    ids = text(60)
    learner = everything(optimizer=optimizer, options=Options())
    learner.observe(ids[:40])
    resumed = Learner.restore(tiny_llama(dtype=torch.float32), through_json(learner.memory()))
    for each in (learner, resumed):
        each.observe(ids[40:])
    same(learner, resumed)
    assert learner.memory().differences


def test_a_difference_that_does_not_round_back_is_kept_exactly() -> None:
    """Where a weight changes its sign, base + difference need not be the learned weight in floating point."""
    model = tiny_llama(dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = dict(model.named_parameters())[name]
    with torch.no_grad():
        weight.copy_((torch.rand_like(weight) - 0.5) * 0.05)
    learner = Learner(model, {"fast": Level(8, (name,))}, lr=0.01, context=16)
    base = copy_of(model)[name]
    learner.observe(text(80))
    memory = learner.memory()
    assert not torch.equal(base + memory.differences[name], weight)
    learner.detach()
    assert torch.equal(weight, base)
    resumed = Learner.restore(model, memory)
    learned = weight.detach().clone()
    resumed.detach()
    learner.apply()
    assert torch.equal(weight, learned)


def test_differences_are_learned_minus_base() -> None:
    learner = everything()
    base = copy_of(tiny_llama(dtype=torch.float32))
    learner.observe(text(40))
    memory = learner.memory()
    x = text(12)[None]
    expected = learner.model(input_ids=x).logits
    by_hand = tiny_llama(dtype=torch.float32)
    with torch.no_grad():
        for name, d in memory.differences.items():
            assert (d.left if isinstance(d, LowRank) else d).dtype == torch.float32
            dict(by_hand.named_parameters())[name].add_(d.dense() if isinstance(d, LowRank) else d)
    torch.testing.assert_close(by_hand(input_ids=x).logits, expected, rtol=1e-4, atol=1e-4)
    assert memory.periods == {"fast": 6, "mid": 12, "slow": 18}
    assert set(memory.differences) == {n for level in memory.parameters.values() for n in level}
    learner.detach()
    assert all(torch.equal(p, base[n]) for n, p in learner.model.named_parameters())
    detached = learner.memory()
    assert all(torch.equal(t, detached.tensors[n]) for n, t in memory.tensors.items())


def test_a_memory_for_use_only_is_a_fresh_start() -> None:
    learner = everything()
    learner.observe(text(40))
    memory = replace(learner.memory(), tensors={})
    fresh = Learner.restore(tiny_llama(dtype=torch.float32), memory)
    x = text(12)[None]
    torch.testing.assert_close(fresh.model(input_ids=x).logits, learner.model(input_ids=x).logits)
    assert (fresh.counters.tokens, fresh.stream.filled) == (0, 0)
    assert fresh.memory().documents == memory.documents


def test_the_running_mean_is_read_and_not_learned_on() -> None:
    learner = everything()
    learner.observe(text(40))
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    with learner.averaged():
        assert any(not torch.equal(p, before[name]) for name, p in learner.model.named_parameters())
        for mistake in (lambda: learner.observe(text(3)), learner.detach, learner.consolidate):
            with pytest.raises(RuntimeError, match="running mean is on the model"):
                mistake()
        with pytest.raises(RuntimeError, match="running mean is on the model"), learner.averaged():
            pass
    assert all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())
    learner.detach()
    with pytest.raises(RuntimeError, match="detached"), learner.averaged():
        pass
    with Learner(learner.model, {"all": Level(8, ("*",))}, lr=0.01, context=16) as plain, plain.averaged():
        plain.model(input_ids=text(3)[None])


@pytest.mark.parametrize("rank", [None, 2])
def test_two_users_two_memories_no_leak(rank: int | None) -> None:
    """Each learns as if alone, turns taken in the middle of chunks; the base is as it was, to the last bit."""
    texts = {"a": [3, 4, 5] * 12, "b": text(36).tolist()}
    model = tiny_llama(dtype=torch.float32)
    base, probe = copy_of(model), text(10)[None]
    quiet = model(input_ids=probe).logits
    levels = {"fast": Level(8, ("*mlp*",), rank=rank)}
    options = Options(replay=Replay(4), gate=Gate(quantile=0.1))
    alone = {}
    for user, ids in texts.items():
        single = Learner(tiny_llama(dtype=torch.float32), levels, "delta_gradient_descent", lr=0.1, context=12,
                         options=options)  # fmt: skip
        for at in range(0, 36, 5):
            single.observe(ids[at : at + 5])
        alone[user] = single.model(input_ids=probe).logits
    learners = {}
    for user in texts:
        learners[user] = Learner(model, levels, "delta_gradient_descent", lr=0.1, context=12, options=options)
        learners[user].detach()
    for at in range(0, 36, 5):
        for user, ids in texts.items():
            with learners[user] as learner:
                learner.observe(ids[at : at + 5])
            assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
            assert torch.equal(model(input_ids=probe).logits, quiet)
    for user, learner in learners.items():
        with learner:
            assert torch.equal(model(input_ids=probe).logits, alone[user]), user
    assert not torch.equal(alone["a"], alone["b"])


def test_one_learner_at_a_time() -> None:
    model = tiny_llama()
    first = Learner(model, {"fast": Level(8, (TOP,))}, lr=0.01, context=16)
    with pytest.raises(ValueError, match="another learner is attached"):
        Learner(model, {"fast": Level(8, (TOP,))}, lr=0.01, context=16)
    first.detach()
    second = Learner(model, {"fast": Level(8, (TOP,))}, lr=0.01, context=16)
    with pytest.raises(ValueError, match="another learner is attached"):
        first.apply()
    with pytest.raises(RuntimeError, match="detached"):
        first.observe([1, 2])
    with pytest.raises(RuntimeError, match="detached"):
        first.consolidate()
    second.detach()
    with first:
        first.observe([1, 2])


def _without(memory: Memory, key: str) -> Memory:
    return replace(memory, tensors={k: v for k, v in memory.tensors.items() if not k.startswith(key)})


def _with_settings(memory: Memory, key: str, value: object) -> Memory:
    return replace(memory, settings={**memory.settings, key: value})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: replace(m, fingerprint="0" * 16), "belongs to the base model"),
        (lambda m: replace(m, periods={**m.periods, "fast": 3}), "levels and periods"),
        (lambda m: replace(m, parameters={**m.parameters, "slow": []}), "other parameters"),
        (lambda m: _without(m, "history"), "does not fit together"),
        (lambda m: _without(m, "pieces"), "does not fit together"),
        (lambda m: _with_settings(m, "guard", None), "does not fit together"),
        (lambda m: _with_settings(m, "stream", {"open": True, "starts": [0] * 99}), "does not fit together"),
        (lambda m: replace(m, tensors={**m.tensors, "pieces.0": torch.full((5,), 4000)}), "vocabulary"),
        (lambda m: replace(m, tensors={**m.tensors, "optimizer.999.step": torch.ones(())}), "more parameters"),
        (lambda m: replace(m, differences={**m.differences, m.parameters["fast"][0]: torch.ones(2, 2)}), "shape"),
        (lambda m: replace(m, differences={**m.differences, m.parameters["mid"][0]: torch.ones(2, 2)}), "rank"),
        (lambda m: _with_settings(m, "learner", {"levels": 3}), "lack optimizer"),
        (lambda m: replace(m, settings={}), "no learner's settings"),
    ],
)
def test_a_memory_that_does_not_fit_is_refused(spoil, message: str) -> None:
    learner = everything()
    learner.observe(text(40))
    model = tiny_llama(dtype=torch.float32)
    base = copy_of(model)
    with pytest.raises(ValueError, match=message):
        Learner.restore(model, spoil(learner.memory()))
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
    Learner.restore(model, learner.memory())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors, index: {f"optimizer.{index}.exp_avg": torch.zeros(2, 3)},
        lambda tensors, index: {f"optimizer.{index}.exp_avg_sq": torch.zeros(())[None, None, None]},
    ],
)
def test_optimizer_state_of_another_shape_is_explained(spoil) -> None:
    learner = Learner(tiny_llama(), {"fast": Level(8, (TOP,))}, lr=0.01, context=16)
    learner.observe(text(16))
    memory = learner.memory()
    index = next(name.split(".")[1] for name in memory.tensors if name.endswith("exp_avg"))
    spoiled = replace(memory, tensors=memory.tensors | spoil(memory.tensors, index))
    with pytest.raises(MemoryUseError, match=r"optimizer state does not fit.*exp_avg.*fresh optimizer"):
        Learner.restore(tiny_llama(), spoiled)
    lacking = {name: t for name, t in memory.tensors.items() if not name.endswith("exp_avg")}
    before = learner.optimizer.state_dict()["state"]
    with pytest.raises(MemoryUseError, match=r"has no 'exp_avg'.*fresh optimizer"):
        learner.load(replace(memory, tensors=lacking))
    assert learner.optimizer.state_dict()["state"].keys() == before.keys()
    learner.observe(text(8))


def test_a_factory_that_fails_is_not_blamed_on_a_memory() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure=None) -> None:
            raise KeyError("its own")

    level = Level(8, (TOP,), optimizer=lambda parameters: Broken(parameters, lr=0.01))
    learner = Learner(tiny_llama(), {"fast": level}, lr=1.0, context=16)
    learner.load(replace(learner.memory(), tensors={}))
    with pytest.raises(KeyError, match="its own"):
        learner.observe(text(8))


def test_a_memory_of_another_architecture_is_named_as_that() -> None:
    learner = everything()
    with pytest.raises(ValueError, match="belongs to the base model"):
        Learner.restore(tiny_llama(layers=1), learner.memory())
    learner.observe(text(12))
    with pytest.raises(ValueError, match="another learner is attached"):
        Learner.restore(learner.model, learner.memory())


def test_optimizers_given_as_functions_come_back_by_load() -> None:
    def make(model: nn.Module) -> Learner:
        level = Level(8, (TOP,), optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01))
        return Learner(model, {"fast": level}, lr=1.0, context=16)

    learner, ids = make(tiny_llama()), text(60)
    learner.observe(ids[:30])
    memory = through_json(learner.memory())
    with pytest.raises(ValueError, match="made by a function"):
        Learner.restore(tiny_llama(), memory)
    resumed = make(tiny_llama())
    resumed.load(memory)
    for each in (learner, resumed):
        each.observe(ids[30:])
    same(learner, resumed)


def test_loading_replaces_what_a_learner_knows() -> None:
    a, b = everything(), everything()
    a.observe(text(40))
    b.observe(text(50, 1))
    memory: Memory = a.memory()
    b.load(memory)
    same(a, b)


def test_a_learned_rate_survives() -> None:
    learner = everything()
    for group in learner.optimizer.param_groups:
        group["lr"] = 0.123
    resumed = Learner.restore(tiny_llama(dtype=torch.float32), learner.memory())
    assert {group["lr"] for group in resumed.optimizer.param_groups} == {0.123}
