"""Losses of what is read beside a chunk: taught by the model with other weights than its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.scoring import divergences

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner


def taught_by(
    learner: Learner, teacher: Callable[[], AbstractContextManager[None]]
) -> Callable[[Sequence[Piece]], Float[Tensor, " targets"]]:
    """KL(what the model says with `teacher` || what it says), of every target."""

    def losses(pieces: Sequence[Piece]) -> Float[Tensor, " targets"]:
        with teacher(), torch.no_grad():
            said = learner.reader.logits(pieces)
        return divergences(said, learner.reader.logits(pieces))

    return losses
