"""The three models of looped depth, and what counts as a right answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nestling.tasks.addition import AdditionTask
from reproductions.looped_depth import run as looped


@pytest.mark.parametrize("task", list(looped.TASKS))
def test_a_loop_has_the_parameters_of_one_block_and_the_work_of_all(task: str) -> None:
    once, again, deep = (looped.build("transformer", model, task, 0) for model in ("once", "looped", "deep"))
    sizes = [sum(p.numel() for p in model.blocks.parameters()) for model in (once, again, deep)]
    assert sizes == [sizes[0], sizes[0], looped.LOOPS * sizes[0]]
    passes = [model.config.loops * len(model.blocks) for model in (once, again, deep)]
    assert passes == [1, looped.LOOPS, looped.LOOPS]


@pytest.mark.parametrize(("task", "share"), [(AdditionTask(2, 2), 0.0), (looped.HopTask(64, 1, 4), 0.5)])
def test_a_sum_is_right_when_all_its_digits_are(task: looped.Task, share: float) -> None:
    generator = torch.Generator().manual_seed(looped.TEST_SEED)

    def model(tokens: torch.Tensor, **kwargs: Any) -> SimpleNamespace:
        """Answers every second asked place of a row rightly."""
        same, answers = task.sample(64, generator)
        assert same.equal(tokens)
        asked = answers != looped.IGNORE
        wrong = asked & (asked.cumsum(1) % 2 == 0)
        found = torch.where(wrong, (answers + 1) % task.vocab_size, answers.clamp_min(0))
        return SimpleNamespace(logits=F.one_hot(found, task.vocab_size))

    assert looped.accuracy(model, task, 64) == pytest.approx(share, abs=0.02)  # type: ignore[arg-type]


def test_the_longest_trainings_are_shown_by_seed() -> None:
    def row(steps: int, seed: int, model: str, test: float) -> dict[str, Any]:
        made = {"preset": "transformer", "task": "hops", "model": model, "steps": steps, "seed": seed}
        return made | {"test": [test] * 4, "block_parameters": 64, "loops": {"8": [test / 2] * 4}}

    parts = looped.report([row(2, 1, "looped", 0.5), row(2, 0, "looped", 0.25), row(1, 0, "deep", 1.0)]).parts
    assert "| `transformer` | looped | 64 | 0.375 (0.250, 0.500) |" in parts["results"]
    assert "| `transformer` | 8 | 0.188 (0.125, 0.250) |" in parts["loops"] and "deep" not in parts["results"]
