"""n-ary addition: the data are what the task says."""

from __future__ import annotations

import pytest
import torch

from nestling.tasks.addition import EQUALS, IGNORE, PLUS, AdditionTask


def sample(task: AdditionTask, rows: int = 50, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return task.sample(rows, torch.Generator().manual_seed(seed))


def number(digits: list[int]) -> int:
    """Of digits from the lowest."""
    return int("".join(map(str, reversed(digits))))


@pytest.mark.parametrize("task", [AdditionTask(2, 1), AdditionTask(2), AdditionTask(12, 2), AdditionTask(5, 4)])
def test_sums_are_right(task: AdditionTask) -> None:
    tokens, answers = sample(task)
    assert tokens.shape == answers.shape == (50, task.length)
    width = task.digits + 1
    for row, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        operands = [row[i * width : (i + 1) * width] for i in range(task.operands)]
        assert [o.pop() for o in operands] == [PLUS] * (task.operands - 1) + [EQUALS]
        equals = row.index(EQUALS)
        assert answer[:equals] == [IGNORE] * equals
        assert len(answer[equals:]) == task.answer_digits
        assert number(answer[equals:]) == sum(map(number, operands))
        assert row[equals + 1 :] == answer[equals:-1]  # what is answered is read next
    assert int(tokens.max()) < task.vocab_size


def test_the_example_of_the_description() -> None:
    tokens, answers = sample(AdditionTask(2, 2), rows=100_000)
    row = tokens.tolist().index([2, 1, PLUS, 4, 3, EQUALS, 6, 4])
    assert answers[row, 5:].tolist() == [6, 4, 0]


def test_the_largest_sum_fits() -> None:
    assert [AdditionTask(*t).answer_digits for t in ((2, 1), (11, 1), (12, 1), (2, 3), (101, 2))] == [2, 2, 3, 4, 4]


def test_the_same_seed_gives_the_same_data() -> None:
    task = AdditionTask(3)
    assert all(torch.equal(a, b) for a, b in zip(sample(task), sample(task), strict=True))
    assert not torch.equal(sample(task)[0], sample(task, seed=1)[0])


@pytest.mark.parametrize("settings", [(1, 3), (2, 0)])
def test_what_does_not_fit_is_refused(settings: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="needs 2 numbers of 1 digit at least"):
        AdditionTask(*settings)
