"""What is read beside a chunk: pieces of the replay buffer, and text of the pre-trained model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from nestling.continual.learner.options import Rehearsal
from nestling.continual.stream.chunks import Piece, decode
from nestling.continual.stream.scoring import divergences, learning

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner

ROWS = 64
"""Written by the model at a time."""
REHEARSE = 2
"""Keeps these draws apart from the reservoir's."""
SAVED = "rehearsal"


@dataclass(frozen=True)
class Beside:
    """Pieces with a loss of their own, read in a pass of their own.

    Attributes:
        pieces: with a target each, or more.
        losses: of a batch of them, with gradients.
        weight: of their mean loss beside the chunk's.
        projection: take out of every level's gradient of the chunk what would raise that loss.
    """

    pieces: Sequence[Piece]
    losses: Callable[[Sequence[Piece]], Float[Tensor, " targets"]]
    weight: float
    projection: bool = False


class Written:
    """Text of the pre-trained model, written when it is first asked for.

    Args:
        options: how much.
        context: of the learner, in tokens.
        seed: of the text and of the draws.
    """

    def __init__(self, options: Rehearsal, context: int, seed: int) -> None:
        self.shape, self.weight, self.seed = (
            (options.pieces, options.length or max(2, context // 2)),
            options.weight,
            seed,
        )
        self.ids: Int[Tensor, "pieces length"] | None = None

    def piece(self, learner: Learner, number: int) -> Piece:
        """The one that goes with the `number`-th chunk."""
        ids = self.ids if self.ids is not None else self.write(learner)
        row = np.random.default_rng((self.seed, REHEARSE, number)).integers(len(ids))
        return _whole(ids[int(row)])

    def write(self, learner: Learner, on_token: Callable[[int], object] | None = None) -> Int[Tensor, "pieces length"]:
        """Have the base model write it; `on_token` as in the function of this name."""
        with base_weights(learner):
            self.ids = write(learner, *self.shape, self.seed, on_token)
        return self.ids

    def state(self) -> dict[str, Tensor]:
        """The text, once there is some."""
        return {} if self.ids is None else {SAVED: self.ids.clone()}

    def checked(self, tensors: Mapping[str, Tensor], vocabulary: int) -> Int[Tensor, "pieces length"] | None:
        """The text of a memory; None where nothing was written yet.

        Raises:
            ValueError: it is not of these settings or this vocabulary.
        """
        ids = tensors.get(SAVED)
        if ids is not None and (ids.dtype != torch.int64 or tuple(ids.shape) != self.shape):
            raise ValueError("the memory's rehearsed text is not {} pieces of {} tokens".format(*self.shape))
        if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(f"the memory's rehearsed text is not in the vocabulary of {vocabulary}")
        return None if ids is None else ids.clone()


def companions(learner: Learner) -> tuple[list[Piece], list[Beside]]:
    """What is read with the present chunk: pieces that join it in one pass, and those that stand beside it."""
    joined: list[Piece] = []
    beside: list[Beside] = []
    replay = learner.settings.options.replay
    if replay is not None and learner.buffer is not None and len(learner.buffer):
        drawn = [decode(item.tokens, item.metadata["start"]) for item in learner.buffer.sample(replay.pieces)]
        if replay.teacher is not None and learner.average is not None:
            losses = _taught_by(learner, learner.average.in_place)
            beside.append(Beside(drawn, losses, replay.weight, replay.projection))
        elif replay.projection:
            beside.append(Beside(drawn, learner.reader.losses, replay.weight, projection=True))
        else:
            joined = drawn
    if learner.written is not None:
        piece = learner.written.piece(learner, learner.counters.chunks)
        losses = _taught_by(learner, lambda: base_weights(learner))
        beside.append(Beside([piece], losses, learner.written.weight))
    return joined, beside


@contextmanager
def base_weights(learner: Learner) -> Iterator[None]:
    """The model as it was before it learned, and as it is afterwards."""
    with ExitStack() as back:
        for weights in learner.weights.values():
            weights.detach()
            back.callback(weights.attach)
        yield


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
        _generating(model, plain),
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
def _generating(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
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


def _taught_by(
    learner: Learner, teacher: Callable[[], AbstractContextManager[None]]
) -> Callable[[Sequence[Piece]], Float[Tensor, " targets"]]:
    """KL(what the model says with `teacher` || what it says), of every target."""

    def losses(pieces: Sequence[Piece]) -> Float[Tensor, " targets"]:
        with teacher(), torch.no_grad():
            said = learner.reader.logits(pieces)
        return divergences(said, learner.reader.logits(pieces))

    return losses
