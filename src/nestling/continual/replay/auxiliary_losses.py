"""Losses of what is read beside a chunk: taught by the model with other weights than its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.scoring import divergences

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner


@contextmanager
def base_weights(learner: Learner) -> Iterator[None]:
    """The model as it was before it learned, and as it is afterwards."""
    with ExitStack() as back:
        for weights in learner.weights.values():
            weights.detach()
            back.callback(weights.attach)
        yield


def taught_by(
    learner: Learner, teacher: Callable[[], AbstractContextManager[None]]
) -> Callable[[Sequence[Piece]], Float[Tensor, " targets"]]:
    """KL(what the model says with `teacher` || what it says), of every target."""

    def losses(pieces: Sequence[Piece]) -> Float[Tensor, " targets"]:
        with teacher(), torch.no_grad():
            said = learner.reader.logits(pieces)
        return divergences(said, learner.reader.logits(pieces))

    return losses
