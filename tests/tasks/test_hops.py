"""p-hop induction: the data are what the task says."""

from __future__ import annotations

import itertools

import pytest
import torch

from nestling.tasks.hops import IGNORE, HopTask, hop


def sample(task: HopTask, rows: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return task.sample(rows, torch.Generator().manual_seed(seed))


def one_hop(text: list[int], place: int) -> int | None:
    """By looking back token by token."""
    earlier = [i for i in range(place) if text[i] == text[place]]
    return earlier[-1] + 1 if earlier else None


@pytest.mark.parametrize("task", [HopTask(40, 1, 4), HopTask(33, 3, 3, symbols=5), HopTask(16, 4, 9, symbols=3)])
def test_answers_are_so_many_hops_away(task: HopTask) -> None:
    tokens, answers = sample(task)
    assert tokens.shape == answers.shape == (40, task.length)
    asked = 0
    for row, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        question, text = row[0], row[1:]
        assert question == task.symbols + task.hops - 1 < task.vocab_size
        assert answer[0] == IGNORE
        assert set(text) <= set(range(task.symbols))
        assert all(a != b for a, b in itertools.pairwise(text))
        for place, found in enumerate(answer[1:]):
            at: int | None = place
            for _ in range(task.hops):
                at = None if at is None else one_hop(text, at)
            assert found == (IGNORE if at is None else text[at])
            asked += found != IGNORE
    assert asked > 40


def test_the_example_of_the_description() -> None:
    assert hop(torch.tensor([[0, 1, 2, 0]]), torch.tensor([[0, 1, 2, 3]])).tolist() == [[-1, -1, -1, 1]]


def test_the_same_seed_gives_the_same_data() -> None:
    task = HopTask(40, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(sample(task), sample(task), strict=True))
    assert not torch.equal(sample(task)[0], sample(task, seed=1)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((40, 0, 4), "1 to 4 hops, not 0"),
        ((40, 5, 4), "1 to 4 hops, not 5"),
        ((40, 1, 4, 2), "at least 3 symbols, not 2"),
        ((6, 4, 4), "4 hops need at least 7 tokens, not 6"),
    ],
)
def test_what_does_not_fit_is_refused(settings: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HopTask(*settings)
