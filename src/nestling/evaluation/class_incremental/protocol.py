"""Class-incremental learning: tasks come one after the other, and after each all classes seen so far are asked.

One pass over the texts, and no method is told which task a question is from (NL section 9.1, Figure 6).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nestling.tasks.classification import ClassTask


class ClassLearner(Protocol):
    """A method. It sees each task once, in order."""

    def learn(self, task: ClassTask) -> None:
        """Learn from the task's training texts, in their order. Its test texts are not to be looked at."""

    def predict(self, texts: Sequence[str]) -> list[int]:
        """The class of every text, among all classes learned so far."""


@dataclass(frozen=True)
class ClassIncrementalResult:
    """What a method got right.

    Attributes:
        matrix: accuracy after task i (row) on the test texts of task j (column); NaN for j > i.
        seen: after each task, the mean over all classes seen of the accuracy on a class.
        learn_seconds, predict_seconds: of each task.
    """

    matrix: list[list[float]]
    seen: list[float]
    learn_seconds: list[float]
    predict_seconds: list[float]

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last of the best accuracy it ever had less the one at the end (Chaudhry et al.
        2018); negative where later tasks helped, 0 for a single task."""
        last, earlier = self.matrix[-1], self.matrix[:-1]
        drops = [max(row[j] for row in earlier[j:]) - last[j] for j in range(len(earlier))]
        return sum(drops) / len(drops) if drops else 0.0

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold; blank fields of the matrix are None."""
        matrix = [[None if math.isnan(x) else round(x, 6) for x in row] for row in self.matrix]
        return {
            "final": round(self.seen[-1], 6),
            "average": round(sum(self.seen) / len(self.seen), 6),
            "forgetting": round(self.forgetting, 6),
            "seen": [round(x, 6) for x in self.seen],
            "matrix": matrix,
            "learn_seconds": [round(x, 2) for x in self.learn_seconds],
            "predict_seconds": [round(x, 2) for x in self.predict_seconds],
        }


def run_class_incremental(
    learner: ClassLearner, tasks: Sequence[ClassTask], report: Callable[[int, float], None] | None = None
) -> ClassIncrementalResult:
    """Teach the tasks in order; after each, ask the test texts of every task seen.

    Args:
        learner: the method.
        tasks: with disjoint classes, each with texts to ask.
        report: called with the number of tasks done and the accuracy over all classes seen.

    Raises:
        ValueError: no tasks, a class in two tasks, a task without test texts, or a method that gives another number of
            answers than it was asked.
    """
    _check(tasks)
    result = ClassIncrementalResult([], [], [], [])
    for done in range(1, len(tasks) + 1):
        start = time.perf_counter()
        learner.learn(tasks[done - 1])
        learned = time.perf_counter()
        asked = [example for task in tasks[:done] for example in task.test]
        answers = learner.predict([example.text for example in asked])
        if len(answers) != len(asked):
            raise ValueError(f"the method gave {len(answers)} answers to {len(asked)} texts")
        right: dict[int, list[bool]] = defaultdict(list)
        for example, answer in zip(asked, answers, strict=True):
            right[example.label].append(answer == example.label)
        rows = [[x for c in task.classes for x in right[c]] for task in tasks[:done]]
        result.matrix.append([_mean(row) for row in rows] + [math.nan] * (len(tasks) - done))
        result.seen.append(_mean([_mean(row) for row in right.values()]))
        result.learn_seconds.append(learned - start)
        result.predict_seconds.append(time.perf_counter() - learned)
        if report is not None:
            report(done, result.seen[-1])
    return result


def _check(tasks: Sequence[ClassTask]) -> None:
    if not tasks:
        raise ValueError("tasks is empty: give at least one")
    classes = [c for task in tasks for c in task.classes]
    if len(set(classes)) < len(classes):
        raise ValueError("a class stands in two tasks; in class-incremental learning every class comes once")
    for number, task in enumerate(tasks, 1):
        if not task.test:
            raise ValueError(f"task {number} has no test texts")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
