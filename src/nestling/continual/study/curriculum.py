"""Which exercises come next: what is known already is visited less."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Visits:
    """Of one exercise.

    Attributes:
        due: the round in which it comes again.
        wait: rounds between its last visit and that one.
        right: whether it was done at the last visit, before it was learned from; None before the first.
    """

    due: int = 0
    wait: int = 1
    right: bool | None = None


class Curriculum:
    """Spaced repetition, as of cards in Leitner's boxes: an exercise that is done waits twice as long as before, one
    that is not comes again in the next round.

    Args:
        groups: of every exercise, the passage it belongs to.
        most: exercises of a passage in a round.
        seed: of the order.
    """

    def __init__(self, groups: Sequence[int], most: int, seed: int) -> None:
        self.visits = [Visits() for _ in groups]
        self.most, self.seed = most, seed
        self._members: dict[int, list[int]] = defaultdict(list)
        for number, group in enumerate(groups):
            self._members[group].append(number)

    def round(self, number: int) -> list[int]:
        """The exercises of a round, shuffled. Of those of a passage that are due, the ones that have waited longest
        come first."""
        rng = random.Random(f"round {self.seed} {number}")
        found: list[int] = []
        for members in self._members.values():
            due = [i for i in members if self.visits[i].due <= number]
            rng.shuffle(due)
            found += sorted(due, key=lambda i: self.visits[i].due)[: self.most]
        rng.shuffle(found)
        return found

    def saw(self, exercise: int, number: int, right: bool) -> None:
        """It was visited in a round."""
        seen = self.visits[exercise]
        seen.right = right
        seen.wait = 2 * seen.wait if right else 1
        seen.due = number + seen.wait

    @property
    def known(self) -> float:
        """Share of the exercises that were done at their last visit; those that were never visited count as not."""
        return sum(seen.right is True for seen in self.visits) / max(1, len(self.visits))
