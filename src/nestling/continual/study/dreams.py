"""What a model with its memory writes for itself before it consolidates: dreams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from nestling.continual.learner.earlier import EarlierAdapters
from nestling.continual.replay.rehearsal import generating
from nestling.continual.store.scope import Scope
from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.scoring import learning
from nestling.continual.stream.tokenizing import own_beginning, plain_tokens
from nestling.continual.study.lessons import Lesson, spoken

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner

ROWS = 16
"""Dreams that are written together."""
RAREST = 2
"""Words of a passage that a dream begins with, where its text is not there."""
FIRST, LETTERS = 3, 40
"""Words of a passage without a subject, likewise, and characters of them at most."""


def beginnings(
    lessons: Sequence[Lesson], earlier: EarlierAdapters, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """How dreams begin: with whom a passage is about, or with its first words; where there are no texts, with the
    rarest words of every passage.

    Args:
        lessons: of the texts that are there; perhaps none.
        earlier: adapters.
        tokenizer: of the model.
    """
    start = own_beginning(tokenizer)
    read = [each.exercise for each in lessons if each.exercise.kind == "passage"]
    names = [each.about or " ".join(each.answer.split()[:FIRST])[:LETTERS] for each in read]
    if names:
        return [[*start, *plain_tokens(tokenizer, name)] for name in dict.fromkeys(names)]
    return [[*start, *own] for each in earlier.adapters for own in _rarest(each.scope)]


def dream(learner: Learner, starts: Sequence[Sequence[int]], length: int, seed: int, scope: Scope) -> list[Piece]:
    """Texts that the model as it is samples, without the temperature and limits of its generation settings.

    Args:
        learner: attached.
        starts: what each begins with.
        length: tokens after that.
        seed: of the sampling; random numbers elsewhere are as if nothing had been drawn.
        scope: what is written outside of it is left out.
    """
    model, found = learner.model, []
    device = next(model.parameters()).device
    plain = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length, pad_token_id=0)
    with (
        torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]),
        learning(model, ()),
        generating(model, plain),
    ):
        torch.manual_seed(seed)
        for place in range(0, len(starts), ROWS):
            rows, mask = _left_padded(starts[place : place + ROWS])
            ids: Tensor = model.generate(rows.to(device), attention_mask=mask.to(device)).cpu()  # type: ignore[operator]
            for row, start, kept in zip(ids, starts[place:], mask, strict=False):
                own = row[int((kept == 0).sum()) :]
                found.append(Piece(own, len(start), torch.ones(len(own) - len(start), dtype=torch.bool)))
    return [piece for each in found if (piece := spoken(each, scope)) is not None]


def helpful(
    dreams: Sequence[Piece],
    probes: Sequence[Piece],
    loss: Callable[[Sequence[Piece]], Tensor],
    parameters: Sequence[Tensor],
) -> list[Piece]:
    """Dreams from which a small step of gradient descent lowers the probes' loss, to first order.

    Args:
        dreams, probes: pieces.
        loss: of pieces, with gradients.
        parameters: that would take the step.
    """

    def gradient(pieces: Sequence[Piece]) -> list[Tensor]:
        found = torch.autograd.grad(loss(pieces), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    if not probes:
        return list(dreams)
    wanted = gradient(probes)
    return [
        each for each in dreams if sum(float((a * b).sum()) for a, b in zip(gradient([each]), wanted, strict=True)) > 0
    ]


def _rarest(scope: Scope) -> list[list[int]]:
    """Of every passage its rarest words, as they are first written inside a text."""
    written: dict[int, tuple[int, ...]] = {}
    for tokens, word in scope.forms:
        written.setdefault(word, tokens)
    chosen = [sorted(own, key=lambda word: -scope.surprise[word])[:RAREST] for own in scope.passages]
    return [[token for word in own for token in written[word]] for own in chosen if own]


def _left_padded(starts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, starts))
    rows, mask = (torch.zeros(len(starts), longest, dtype=torch.long) for _ in range(2))
    for row, start in enumerate(starts):
        rows[row, longest - len(start) :] = torch.tensor(start)
        mask[row, longest - len(start) :] = 1
    return rows, mask
