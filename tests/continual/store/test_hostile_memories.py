"""Memories whose every byte is signed and whose content is hostile: refused with a sentence, and no model changed."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.continual.learner.guards import LearningDivergedError, LearningWarning
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.options import Gate, Level, Options, Rehearsal, Replay, UpdateLimit
from nestling.continual.store.memory import Memory
from tests.continual.stream.stream_models import copy_of, text, tiny_llama

Path = tuple[str | int, ...]
VALUES: tuple[Any, ...] = (
    *(None, -1, 0, 1, -5, 10**30, 10**400, 1e308, -1e308, float("nan"), float("inf"), 0.5, True, False),
    *("x", "", "9" * 50, [], {}, [1], {"a": 1}),
)
OPTIONS = Options(
    retention={"fast": 0.95},
    limit=UpdateLimit(relative=0.01),
    gate=Gate(quantile=0.2, window=30),
    replay=Replay(4, 2, 0.5, projection=True, teacher="average"),
    average=20,
    rehearsal=Rehearsal(2, 5),
)


@pytest.fixture(scope="module")
def learned() -> Memory:
    levels = {"fast": Level(6, ("*layers.1.mlp.*",)), "slow": Level(12, ("*layers.0.mlp.*",))}
    learner = Learner(tiny_llama(), levels, "adamw", lr=0.01, context=16, options=OPTIONS)
    learner.observe(text(27))
    return learner.memory()


def leaves(value: Any, path: Path = ()) -> Iterator[Path]:
    """Places of everything in JSON values, the first two entries of a list."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from leaves(entry, (*path, key))


def put(settings: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """Settings with one value exchanged."""
    changed = copy.deepcopy(settings)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def spoiled(tensor: Tensor) -> list[Tensor]:
    """A tensor in other shapes, types and values."""
    other = tensor.to(torch.int32) if tensor.is_floating_point() else tensor.float()
    absurd = float("nan") if tensor.is_floating_point() else -(2**40)
    return [torch.cat([tensor.flatten()] * 2), other, tensor.flatten()[:0], torch.full_like(tensor, absurd)]


def attempt(memory: Memory, what: str) -> bool:
    """Whether it was refused; anything but a sentence or a learner that goes on is a fault."""
    model = tiny_llama()
    base, learner = copy_of(model), None
    try:
        learner = Learner.restore(model, memory)
        learner.observe(text(12, seed=3))
        learner.memory()
        return False
    except (ValueError, LearningDivergedError) as error:
        assert str(error) and len(str(error)) < 1000, what
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}, {error}") from error
    finally:
        if learner is not None:
            learner.detach()
        assert all(torch.equal(p, base[name]) for name, p in model.named_parameters()), what
        assert not any(module._forward_hooks for module in model.modules()), what


def test_hostile_settings(learned: Memory) -> None:
    chance = random.Random(0)
    refused = tried = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LearningWarning)
        for path in leaves(learned.settings):
            for value in chance.sample(VALUES, 5):
                refused += attempt(replace(learned, settings=put(learned.settings, path, value)), f"{path} = {value!r}")
                tried += 1
    assert tried > 300 and 0.6 * tried < refused < tried


@pytest.mark.any_shapes
def test_hostile_tensors(learned: Memory) -> None:
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LearningWarning)
        for name, tensor in learned.tensors.items():
            attempt(replace(learned, tensors={n: t for n, t in learned.tensors.items() if n != name}), f"no {name}")
            for other in spoiled(tensor):
                what = f"{name} as {other.dtype} of {tuple(other.shape)}"
                refused += attempt(replace(learned, tensors=learned.tensors | {name: other}), what)
    assert refused > len(learned.tensors)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_refused_memory_leaves_the_learner_as_it_was(rank: int | None) -> None:
    def learner_of(seed: int) -> Learner:
        levels = {"fast": Level(8, ("*layers.1.mlp.*",)), "slow": Level(16, ("*layers.0.mlp.*",))}
        learner = Learner(tiny_llama(), levels, lr=0.01, context=16, options=Options(rank=rank, replay=Replay(4)))
        learner.observe(text(37, seed))
        return learner

    ann, ben = learner_of(1), learner_of(2).memory()
    before = ann.memory()
    last = list(ben.differences)[-1]
    with pytest.raises(ValueError, match="difference of"):
        ann.load(replace(ben, differences=ben.differences | {last: torch.zeros(3, 3)}))
    step = [name for name in ben.tensors if name.endswith(".step")][-1]
    with pytest.raises(ValueError, match="optimizer state does not fit"):
        ann.load(replace(ben, tensors={name: t for name, t in ben.tensors.items() if name != step}))
    after = ann.memory()
    assert after.settings == before.settings and after.documents == before.documents
    assert all(torch.equal(after.tensors[name], value) for name, value in before.tensors.items())
    ann.load(ben)
    assert all(torch.equal(ann.memory().tensors[name], value) for name, value in ben.tensors.items())


def test_exact_values_out_of_place_are_refused() -> None:
    levels = {"fast": Level(8, ("*layers.1.mlp.*",))}
    learner = Learner(tiny_llama(), levels, lr=0.1, context=16)
    learner.observe(text(32))
    memory = learner.memory()
    index = next(name for name in memory.tensors if name.startswith("exact.") and name.endswith(".index"))
    count = len(memory.tensors[index])
    for wrong in (torch.full((count,), 10**6), torch.full((count,), -1), torch.zeros(count + 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="exact values"):
            learner.load(replace(memory, tensors=memory.tensors | {index: wrong}))
    learner.load(memory)
