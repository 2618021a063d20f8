"""What the model knew before is kept by text of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from nestling.continual.component import LEARNING, Companion, LearnerComponent
from nestling.continual.replay.auxiliary_losses import taught_by
from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.scoring import learning
from nestling.settings import NO_FLAG, check, setting

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner

ROWS = 64
"""Written by the model at a time."""
REHEARSE = 2
"""Keeps these draws apart from the reservoir's."""


@dataclass(frozen=True)
class Rehearsal:
    """What the model knew before, kept by text of its own (pseudo-rehearsal, Robins 1995): before it learns, it writes
    some, and with every chunk KL(base || model) on one piece is added to the loss. No text of anybody's is stored.

    Attributes:
        pieces: written, by plain sampling, since they stand for all that the model knows.
        length: tokens of each, at most the learner's context; None is half of that.
        weight: of the piece's mean divergence beside the chunk's mean loss.
    """

    pieces: int = setting(
        64,
        help="Pieces of text that the model writes before it learns; one with each chunk keeps what it knew.",
        flag="rehearse",
        panel=LEARNING,
        metavar="PIECES",
        off=0,
        at_least=1,
    )
    length: int | None = setting(None, help="Tokens of each.", flag=NO_FLAG, at_least=2)
    weight: float = setting(0.3, help="Of a piece's divergence beside the chunk's loss.", flag=NO_FLAG, at_least=0)

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range."""
        check(self)


class RehearsedText(LearnerComponent):
    """Text of the pre-trained model, written when it is first asked for."""

    draws = True
    reads_apart = True

    def __init__(self, settings: Rehearsal, learner: Learner) -> None:
        super().__init__(settings, learner)
        context = learner.settings.context
        if (settings.length or 0) > context:
            raise ValueError(f"rehearsed pieces of {settings.length} tokens do not fit a context of {context}")
        self.shape = (settings.pieces, settings.length or max(2, context // 2))
        self.weight, self.seed = settings.weight, learner.settings.options.seed
        self.ids: Int[Tensor, "pieces length"] | None = None

    def companions(self) -> Sequence[Companion]:
        """A piece, taught by the base model."""
        losses = taught_by(self.learner, self.learner.base_weights)
        return (Companion([self.piece(self.learner.counters.chunks)], self.weight, losses),)

    def piece(self, number: int) -> Piece:
        """The one that goes with the `number`-th chunk."""
        ids = self.write()
        row = np.random.default_rng((self.seed, REHEARSE, number)).integers(len(ids))
        return _whole(ids[int(row)])

    def write(self, on_token: Callable[[int], object] | None = None) -> Int[Tensor, "pieces length"]:
        """Have the base model write it, where it has not yet.

        Args:
            on_token: as in the function of this name.

        Raises:
            RuntimeError: the learner is detached.
        """
        if self.ids is not None:
            return self.ids
        self.learner.check_at_work()
        with self.learner.base_weights():
            self.ids = write(self.learner, *self.shape, self.seed, on_token)
        return self.ids

    def tensors(self) -> dict[str, Tensor]:
        """The text, once there is some."""
        return {} if self.ids is None else {"": self.ids.clone()}

    def prepare(self, tensors: Mapping[str, Tensor], values: Any) -> Callable[[], None]:
        """Text of these settings and this vocabulary, or none."""
        ids, vocabulary = tensors.get(""), self.learner.vocabulary
        if ids is not None and (ids.dtype != torch.int64 or tuple(ids.shape) != self.shape):
            raise ValueError("the memory's rehearsed text is not {} pieces of {} tokens".format(*self.shape))
        if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(f"the memory's rehearsed text is not in the vocabulary of {vocabulary}")

        def take() -> None:
            self.ids = None if ids is None else ids.clone()

        return take


class _Watch(StoppingCriteria):
    """Stops nothing; tells how many tokens there are."""

    def __init__(self, done: int, on_token: Callable[[int], object]) -> None:
        self.done, self.on_token = done, on_token

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Bool[Tensor, " rows"]:  # type: ignore[override]
        self.on_token(self.done + input_ids.numel())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def write(
    learner: Learner, pieces: int, length: int, seed: int, on_token: Callable[[int], object] | None = None
) -> Int[Tensor, "pieces length"]:
    """Text that the model as it is samples from its beginning token, or from any token where it has none, without the
    temperature, limits and penalties of its generation settings.

    Args:
        learner: attached.
        pieces, length: rows, and tokens of each.
        seed: of the sampling; random numbers elsewhere are as if nothing had been drawn.
        on_token: told after each step how many of the pieces x length tokens there are; what it raises ends the
            writing, and the model and the random numbers are then as before.
    """
    model, found = learner.model, []
    first = getattr(model.config, "bos_token_id", None)
    beginning = first if isinstance(first, int) and 0 <= first < learner.vocabulary else None
    device = next(model.parameters()).device
    plain = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length - 1, pad_token_id=0)
    with (
        torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]),
        learning(model, ()),
        generating(model, plain),
    ):
        torch.manual_seed(seed)
        for begin in range(0, pieces, ROWS):
            shape = (min(ROWS, pieces - begin), 1)
            start = torch.randint(learner.vocabulary, shape) if beginning is None else torch.full(shape, beginning)
            mask = torch.ones(shape, dtype=torch.long, device=device)
            watch = [] if on_token is None else [_Watch(begin * length, on_token)]
            ids: Tensor = model.generate(  # type: ignore[operator]  # a mixin's
                start.to(device), attention_mask=mask, stopping_criteria=StoppingCriteriaList(watch)
            )
            found.append(ids.cpu())
    return torch.cat(found)


@contextmanager
def generating(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """With other generation settings than its own, which fill up those that are given in a call."""
    kept, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = kept


def written_pieces(learner: Learner, pieces: int, length: int, seed: int) -> list[Piece]:
    """`write` as pieces, every token but the first of each a target."""
    return [_whole(row) for row in write(learner, pieces, length, seed)]


def _whole(row: Tensor) -> Piece:
    return Piece(row, 0, torch.ones(len(row), dtype=torch.bool))
