"""A learner learns from what is surprising enough only."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.continual.component import Bounds, LearnerComponent
from nestling.continual.stream.chunks import Piece
from nestling.settings import check, setting

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner


@dataclass(frozen=True)
class Gate:
    """Learn from what is surprising enough only; everything is scored. With a quantile and a threshold, from losses
    above the larger.

    Attributes:
        by: "token" leaves single tokens out of the loss, "chunk" leaves whole chunks unlearned.
        quantile: learn from losses above this quantile of the last `window` ones (of tokens, or of chunk means).
        threshold: learn from losses above it, nats.
        window: losses remembered.
    """

    by: Literal["token", "chunk"] = setting("token", help="Leave single tokens out of the loss, or whole chunks.")
    quantile: float | None = setting(
        None, help="Learn from losses above this quantile of the last ones.", at_least=0, at_most=1
    )
    threshold: float | None = setting(None, help="Learn from losses above it, nats.")
    window: int = setting(4096, help="Losses remembered.", at_least=1)

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range."""
        if self.quantile is None and self.threshold is None:
            raise ValueError("a Gate has a quantile or a threshold, or both")
        check(self)


class SurpriseGate(LearnerComponent):
    """Which losses are learned from."""

    def __init__(self, settings: Gate, learner: Learner) -> None:
        super().__init__(settings, learner)
        self.gate = settings
        self.recent: deque[float] = deque(maxlen=settings.window)

    def bounds(self) -> Bounds:
        """A quantile of the chunks before, or the threshold, whichever is larger."""
        found = -math.inf if self.gate.threshold is None else self.gate.threshold
        if self.gate.quantile is not None and self.recent:
            values = torch.tensor(list(self.recent), dtype=torch.float64)
            # The nearest rank below: a value that occurred, found alike in every precision.
            found = max(found, float(torch.quantile(values, self.gate.quantile, interpolation="lower")))
        return Bounds(token=found) if self.gate.by == "token" else Bounds(chunk=found)

    def learned(self, pieces: Sequence[Piece], losses: Float[Tensor, " targets"]) -> None:
        """Count a chunk's losses among the recent ones."""
        if len(losses):
            self.recent.extend(losses.tolist() if self.gate.by == "token" else [float(losses.mean())])

    def tensors(self) -> dict[str, Tensor]:
        """The recent losses."""
        return {"": torch.tensor(list(self.recent), dtype=torch.float64)}

    def prepare(self, tensors: Mapping[str, Tensor], values: Any) -> Callable[[], None]:
        """Recent losses, or none."""
        recent = tensors.get("", torch.empty(0))
        if recent.dim() != 1 or not recent.is_floating_point():
            raise ValueError("the memory's losses of the gate are no list of numbers")
        found = recent.tolist()

        def take() -> None:
            self.recent.clear()
            self.recent.extend(found)

        return take
