"""Learning whole documents: how they are cut into steps, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nestling.continual.learn_documents import Autosave, Progress, Text, learn_text
from nestling.continual.learner.learner import Learner
from nestling.continual.store.store import MemoryStore
from tests.continual.stream.stream_models import text, tiny_llama


def learner_of(chunk: int) -> tuple[Learner, list[int]]:
    """A learner with this chunk, and a list that gets the tokens of every forward pass."""
    model, read = tiny_llama(), []
    learner = Learner(model, {"*.mlp.*": chunk}, lr=0.01, context=16)

    def count(module: object, args: object, named: dict[str, Any], output: object) -> None:
        read.append(named["input_ids"].numel())

    model.register_forward_hook(count, with_kwargs=True)
    return learner, read


@pytest.mark.parametrize("chunk", [5, 24, 100, 300])
def test_every_token_is_read_once(chunk: int, tmp_path: Path) -> None:
    """Steps end with chunks, so no chunk is read for its scores and once more: as many tokens as in a single call."""
    alone, wanted = learner_of(chunk)
    cut, read = learner_of(chunk)
    ids, before = text(700), text(chunk // 2, 1)
    for learner in (alone, cut):
        learner.observe(before)
        learner.end_document()
    losses = alone.observe(ids).losses
    steps: list[Progress] = []
    autosave = Autosave(MemoryStore(tmp_path / "memory"), None, None)
    learn_text(cut, Text("a", "aa", ids), 0, autosave, step=64, on_step=steps.append)
    assert sum(read) == sum(wanted)
    torch.testing.assert_close(torch.cat([s.losses for s in steps]), losses, equal_nan=True)
    assert sum(s.tokens for s in steps) == autosave.unsaved == 700
    assert all(s.tokens <= max(64, chunk) for s in steps)
    assert len(steps) <= 700 / max(chunk, 64 - chunk) + 2
    assert [d.finished for d in cut.log.records] == [True, True]


def test_a_step_is_several_small_chunks(tmp_path: Path) -> None:
    learner, _ = learner_of(10)
    learner.observe(text(3, 1))
    steps: list[Progress] = []
    autosave = Autosave(MemoryStore(tmp_path / "memory"), None, None)
    learn_text(learner, Text("a", "aa", text(100)), 20, autosave, step=32, on_step=steps.append)
    assert [s.tokens for s in steps] == [27, 30, 23]
