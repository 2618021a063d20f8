"""Which exercises come next: the exercises of a passage take turns."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence


class Curriculum:
    """Of every passage so many exercises a round, those that were visited longest ago.

    What is known comes again as well. Visits that grow rarer once an exercise is done, as of cards in Leitner's boxes,
    spare time and cost, in short trials, what is to be learned beyond the exercises: a later text's facts, and answers
    to questions in other words.

    Args:
        groups: of every exercise, the passage it belongs to.
        most: exercises of a passage in a round.
        seed: of the order.
    """

    def __init__(self, groups: Sequence[int], most: int, seed: int) -> None:
        self.right: list[bool | None] = [None for _ in groups]
        self.last = [-1 for _ in groups]
        self.most, self.seed = most, seed
        self._members: dict[int, list[int]] = defaultdict(list)
        for number, group in enumerate(groups):
            self._members[group].append(number)

    def round(self, number: int) -> list[int]:
        """The exercises of a round, shuffled."""
        rng = random.Random(f"round {self.seed} {number}")
        found: list[int] = []
        for members in self._members.values():
            some = list(members)
            rng.shuffle(some)
            found += sorted(some, key=lambda i: self.last[i])[: self.most]
        rng.shuffle(found)
        return found

    def saw(self, exercise: int, number: int, right: bool) -> None:
        """It was visited in a round."""
        self.right[exercise], self.last[exercise] = right, number

    @property
    def known(self) -> float:
        """Share of the exercises that were done at their last visit; those that were never visited count as not."""
        return sum(each is True for each in self.right) / max(1, len(self.right))
