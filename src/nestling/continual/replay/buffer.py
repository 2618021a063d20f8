"""Earlier pieces are learned again with every chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.continual.component import LEARNING, Companion, LearnerComponent
from nestling.continual.learner.average import RunningMean
from nestling.continual.replay.auxiliary_losses import taught_by
from nestling.continual.replay.reservoir import Reservoir
from nestling.continual.stream.chunks import Piece, decode
from nestling.settings import NO_FLAG, check, setting

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner


@dataclass(frozen=True)
class Replay:
    """Earlier pieces learned again with every chunk.

    Attributes:
        capacity: pieces kept, a uniform sample of all learned from (`Reservoir`).
        pieces: replayed with every chunk.
        weight: of their mean loss beside the chunk's.
        projection: where a level's gradient of the chunk would raise the replayed loss, take that component out
            (A-GEM, arXiv:1812.00420, level by level); with `weight` 0 the replayed gradient does nothing else.
            Their gradients are taken apart, two backward passes for one.
        teacher: what the loss of a replayed piece is. None: cross-entropy of its own tokens, which are learned by heart
            as they come again. "average": KL(p || q) to what the running mean of the weights says (`Options.average`),
            so that the slow weights teach the fast ones what they knew of the text and no token of it.
    """

    capacity: int = setting(
        256,
        help="Earlier pieces kept, one learned again with each chunk: by heart, or from a --teacher.",
        flag="replay",
        panel=LEARNING,
        off=0,
        at_least=1,
    )
    pieces: int = setting(1, help="Pieces replayed with every chunk.", flag=NO_FLAG, at_least=1)
    weight: float = setting(1.0, help="Of their loss beside the chunk's.", flag=NO_FLAG, at_least=0)
    projection: bool = setting(False, help="Take out of a gradient what would raise their loss.", flag=NO_FLAG)
    teacher: Literal["average"] | None = setting(None, help="Who teaches what is replayed.", flag=NO_FLAG)

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range."""
        check(self)


class ReplayBuffer(LearnerComponent):
    """A uniform sample of all pieces learned from, and what of it is read with a chunk."""

    draws = True

    def __init__(self, settings: Replay, learner: Learner) -> None:
        super().__init__(settings, learner)
        self.settings = settings
        self.pieces = Reservoir(settings.capacity, learner.settings.options.seed)
        self.reads_apart = settings.projection or settings.teacher is not None

    def companions(self) -> Sequence[Companion]:
        """Some of the pieces, once there are any."""
        if not len(self.pieces):
            return ()
        how, average = self.settings, self.learner.component(RunningMean)
        drawn = [decode(item.tokens, item.metadata["start"]) for item in self.pieces.sample(how.pieces)]
        if how.teacher is not None and average is not None:
            return (Companion(drawn, how.weight, taught_by(self.learner, average.in_place), how.projection),)
        if how.projection:
            return (Companion(drawn, how.weight, self.learner.reader.losses, projection=True),)
        return (Companion(drawn, how.weight),)

    def learned(self, pieces: Sequence[Piece], losses: Float[Tensor, " targets"]) -> None:
        """Offer a chunk's pieces to the buffer."""
        for piece in pieces:
            if bool(piece.targets.any()):
                self.pieces.add(piece.encode(), {"start": piece.start})

    def undo(self) -> Callable[[], None]:
        """Count the draws as before."""
        pieces, before = self.pieces, self.pieces.draws

        def back() -> None:
            pieces.draws = before

        return back

    def tensors(self) -> dict[str, Tensor]:
        """The pieces' tokens."""
        return self.pieces.state()[0]

    def values(self) -> Any:
        """Their places, and the buffer's counters."""
        return self.pieces.state()[1]

    def prepare(self, tensors: Mapping[str, Tensor], values: Any) -> Callable[[], None]:
        """A reservoir of pieces in the vocabulary; an empty one where a memory has none."""
        made = Reservoir(self.settings.capacity, self.learner.settings.options.seed)
        if values is not None:
            made = Reservoir.load(tensors, values)
            if any(set(i.metadata) != {"start"} or not 0 <= i.metadata["start"] < len(i.tokens) for i in made.items):
                raise ValueError("the memory's replayed pieces and their places do not fit together")
            ids = torch.where(tensors["tokens"] < 0, ~tensors["tokens"], tensors["tokens"])
            if bool((ids >= self.learner.vocabulary).any()):
                raise ValueError(f"the memory's replayed tokens are not in the vocabulary of {self.learner.vocabulary}")

        def take() -> None:
            self.pieces = made

        return take
