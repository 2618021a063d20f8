"""Multi-query associative recall: the data are what the task says."""

from __future__ import annotations

import pytest
import torch

from nestling.tasks.associative_recall import IGNORE, OverwriteTask, RecallTask


def sample(task: RecallTask, rows: int = 50, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return task.sample(rows, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("task", [RecallTask(64, 8, 64), RecallTask(33, 8, 20, fill=False), RecallTask(16, 1, 8)])
def test_every_key_is_asked_once_and_its_value_is_the_answer(task: RecallTask) -> None:
    tokens, answers = sample(task)
    assert tokens.shape == answers.shape == (50, task.length)
    start, half = 2 * task.pairs, task.vocab_size // 2
    for row, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        pairs = dict(zip(row[0:start:2], row[1:start:2], strict=True))
        assert len(pairs) == task.pairs
        assert all(0 < key < half <= value < task.vocab_size for key, value in pairs.items())
        asked = [i for i, a in enumerate(answer) if a != IGNORE]
        assert min(asked) >= start
        assert sorted(row[i] for i in asked) == sorted(pairs)
        assert all(answer[i] == pairs[row[i]] for i in asked)
        rest = [t for i, t in enumerate(row) if i >= start and i not in asked]
        assert all(t > 0 for t in rest) if task.fill else not any(rest)


def test_queries_come_soon() -> None:
    """With the paper's exponent, most distances are short; with 1 they are even."""

    def mean_place(power: float) -> float:
        _, answers = sample(RecallTask(256, 4, 64, power=power), rows=400)
        return float((answers != IGNORE).nonzero()[:, 1].float().mean())

    assert mean_place(0.01) < 80
    assert mean_place(1.0) == pytest.approx(132, abs=8)


def test_the_same_seed_gives_the_same_data() -> None:
    task = RecallTask(64, 8, 64)
    assert all(torch.equal(a, b) for a, b in zip(sample(task), sample(task), strict=True))
    assert not torch.equal(sample(task)[0], sample(task, seed=1)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [((31, 8, 64), "need at least 32 tokens, not 31"), ((64, 8, 16), "need a vocabulary of 18, not 16")],
)
def test_what_does_not_fit_is_refused(settings: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecallTask(*settings)


def test_overwritten_values_are_the_answers() -> None:
    """Every key stands once in each block; its answer is what followed it in the second."""
    task = OverwriteTask(block=16, pairs=5, vocab_size=32)
    tokens, answers = task.sample(20, torch.Generator().manual_seed(0))
    assert tokens.shape == answers.shape == (20, task.length)
    for row, wanted in zip(tokens.tolist(), answers.tolist(), strict=True):
        first, second, third = (row[i : i + 16] for i in range(0, 48, 16))
        said = [{block[i]: block[i + 1] for i in range(0, 16, 2) if block[i]} for block in (first, second)]
        asked = {token: wanted[32 + i] for i, token in enumerate(third) if token}
        assert said[0].keys() == said[1].keys() == asked.keys() and len(asked) == 5
        assert asked == said[1] and all(value >= 16 for value in asked.values())
        assert all(answer == IGNORE for answer in wanted[:32])
    again, _ = task.sample(20, torch.Generator().manual_seed(0))
    assert torch.equal(tokens, again)


@pytest.mark.parametrize("settings", [{"block": 8, "pairs": 5}, {"block": 64, "pairs": 16, "vocab_size": 32}], ids=str)
def test_overwriting_more_than_fits_is_refused(settings) -> None:
    with pytest.raises(ValueError, match=r"pairs need blocks|different keys"):
        OverwriteTask(**settings)
