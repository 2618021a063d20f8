"""The runner with methods whose figures are known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest

from nestling.evaluation.class_incremental.protocol import run_class_incremental
from nestling.tasks.classification import ClassTask, LabelledText


def task(classes: Sequence[int], texts: int = 2) -> ClassTask:
    rows = tuple(LabelledText(f"{c}", c) for c in classes for _ in range(texts))
    return ClassTask(tuple(classes), rows, rows)


class Remembers:
    """Knows the classes of the last `span` tasks, and answers 0 to all else."""

    def __init__(self, span: int) -> None:
        self.span = span
        self.tasks: list[tuple[int, ...]] = []

    def learn(self, task: ClassTask) -> None:
        self.tasks.append(task.classes)

    def predict(self, texts: Sequence[str]) -> list[int]:
        known = {c for classes in self.tasks[-self.span :] for c in classes}
        return [int(text) if int(text) in known else 0 for text in texts]


TASKS = [task([1, 2]), task([3, 0], texts=3), task([5])]


def test_one_that_remembers_the_last_task_only() -> None:
    result = run_class_incremental(Remembers(1), TASKS)
    nan = math.nan
    expected = [[1.0, nan, nan], [0.0, 1.0, nan], [0.0, 0.5, 1.0]]  # class 0 is what it says when it knows nothing
    for row, wanted in zip(result.matrix, expected, strict=True):
        assert row == pytest.approx(wanted, nan_ok=True)
    assert result.seen == pytest.approx([1.0, 2 / 4, 2 / 5])  # over classes, not over texts
    assert result.forgetting == pytest.approx((1.0 + 0.5) / 2)


def test_one_that_remembers_all() -> None:
    result = run_class_incremental(Remembers(9), TASKS)
    assert result.seen == [1.0, 1.0, 1.0] and result.forgetting == 0.0


def test_forgetting_counts_from_the_best() -> None:
    class Late(Remembers):
        def predict(self, texts: Sequence[str]) -> list[int]:
            return super().predict(texts) if len(self.tasks) == 2 else [9] * len(texts)

    assert run_class_incremental(Late(9), TASKS).forgetting == pytest.approx(1.0)


def test_json_has_no_nan() -> None:
    values = run_class_incremental(Remembers(1), TASKS).to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["matrix"][0] == [1.0, None, None] and values["final"] == pytest.approx(0.4)
    assert values["average"] == pytest.approx((1 + 0.5 + 0.4) / 3, abs=1e-6)


def test_a_single_task_forgets_nothing() -> None:
    assert run_class_incremental(Remembers(1), TASKS[:1]).forgetting == 0.0


def test_reports_on_the_way() -> None:
    told: list[tuple[int, float]] = []
    run_class_incremental(Remembers(9), TASKS, lambda done, seen: told.append((done, seen)))
    assert told == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_refuses_streams_that_are_none() -> None:
    with pytest.raises(ValueError, match="empty"):
        run_class_incremental(Remembers(1), [])
    with pytest.raises(ValueError, match="two tasks"):
        run_class_incremental(Remembers(1), [task([1]), task([1])])
    with pytest.raises(ValueError, match="task 2 has no test"):
        run_class_incremental(Remembers(1), [task([1]), task([2], 0)])

    class Mute(Remembers):
        def predict(self, texts: Sequence[str]) -> list[int]:
            return []

    with pytest.raises(ValueError, match="0 answers"):
        run_class_incremental(Mute(1), TASKS)
