"""The two settings of the recall reproduction: tasks of training, and difficulties that are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nestling.tasks.associative_recall import OverwriteTask, RecallTask

Task = RecallTask | OverwriteTask


@dataclass(frozen=True)
class Setting:
    """Tasks of one vocabulary.

    Attributes:
        vocab_size: tokens.
        train: tasks of training.
        easy: share of the steps, the first ones, that have the first task alone; the others have all in turn.
        test: difficulties that are reported, by name.
    """

    vocab_size: int
    train: Sequence[Task]
    easy: float
    test: Mapping[str, RecallTask]


def _small() -> Setting:
    test = {
        f"{pairs} pairs in {length}": RecallTask(length, pairs, VOCABULARY)
        for length, pairs in ((32, 4), (64, 16), (128, 32))
    }
    return Setting(VOCABULARY, tuple(test.values()), 0.5, test)


def _authors() -> Setting:
    """What Zoology's code trains and tests its models on, with token 0 where nothing is said, as in its Figure 2."""

    def task(length: int, pairs: int) -> RecallTask:
        return RecallTask(length, pairs, 8192, fill=False)

    train = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
    test = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64))
    named = {f"{pairs} pairs in {length}": task(length, pairs) for length, pairs in test}
    return Setting(8192, tuple(task(*sizes) for sizes in train), 0.0, named)


VOCABULARY = 128
"""Of the small setting."""
SETTINGS = {"small": _small(), "authors": _authors()}
