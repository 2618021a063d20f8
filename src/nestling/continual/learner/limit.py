"""The longest step of a level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from nestling.continual.component import LearnerComponent
from nestling.continual.learner.steps import limit_step, norm
from nestling.settings import check, setting

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner


@dataclass(frozen=True)
class UpdateLimit:
    """The longest step of a level, in the Frobenius norm over all its parameters. With both limits the smaller counts.

    Attributes:
        relative: fraction of the norm of what the level learns before the step.
        absolute: norm.
    """

    relative: float | None = setting(None, help="Longest step, as a part of the norm of what a level learns.", above=0)
    absolute: float | None = setting(None, help="Longest step, a norm.", above=0)

    def __post_init__(self) -> None:
        """Raises ValueError for a limit that is not positive, or none."""
        if self.relative is None and self.absolute is None:
            raise ValueError("an UpdateLimit has a relative or an absolute limit, or both")
        check(self)

    def longest(self, norm: float) -> float:
        """The longest step from weights of this norm."""
        absolute = math.inf if self.absolute is None else self.absolute
        return min(absolute, math.inf if self.relative is None else self.relative * norm)


class StepLimit(LearnerComponent):
    """Shortens the steps of levels that have a limit."""

    def __init__(self, settings: UpdateLimit | Mapping[str, UpdateLimit], learner: Learner) -> None:
        super().__init__(settings, learner)
        names = list(learner.weights)
        if isinstance(settings, Mapping) and (unknown := sorted(set(settings) - set(names))):
            raise ValueError(f"limit names {', '.join(unknown)}; the levels are {', '.join(names)}")
        self.limits = dict(settings) if isinstance(settings, Mapping) else dict.fromkeys(names, settings)
        self.before: dict[str, list[Tensor]] = {}

    def before_step(self, due: Sequence[str]) -> None:
        """Keep the weights of the limited levels."""
        learned = {name: self.learner.weights[name].learned for name in due if name in self.limits}
        self.before = {name: [p.detach().clone() for p in own] for name, own in learned.items()}

    def after_step(self, due: Sequence[str]) -> None:
        """Shorten steps that are too long."""
        for name, old in self.before.items():
            weights = [p.detach() for p in self.learner.weights[name].learned]
            limit_step(weights, old, self.limits[name].longest(norm(old)))
        self.before = {}
