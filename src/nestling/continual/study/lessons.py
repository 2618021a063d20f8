"""Exercises as tokens."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.tokenizing import own_beginning, plain_tokens
from nestling.continual.study.english import GIVEN, SURNAMES
from nestling.continual.study.exercises import Exercise, exercises

READ = ("passage", "sentence")
"""Kinds that are read as they are."""
ENOUGH = 0.8
"""Share of the tokens of what is read as it is that make it known: its first words are nobody's to know."""


@dataclass(frozen=True)
class Lesson:
    """An exercise.

    Attributes:
        text, passage: numbers of the text and the passage it was made of.
        exercise: what it was made of.
        piece: its tokens; the answer's are targets.
    """

    exercise: Exercise
    text: int
    passage: int
    piece: Piece

    def done(self, right: Bool[Tensor, " targets"]) -> bool:
        """Whether it counts as known, by which of its targets were likely."""
        share = float(right.float().mean())
        return share >= ENOUGH if self.exercise.kind in READ else share == 1


def make_lessons(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, context: int) -> list[Lesson]:
    """The exercises of some texts.

    A question that two passages answer differently is left out: nobody could know which is meant.

    Args:
        texts: whole documents.
        tokenizer: of the model that shall learn them.
        context: tokens of a piece at most; what is longer is cut.

    Raises:
        ValueError: texts without a word.
    """
    found, passage = [], -1
    answers: dict[str, set[str]] = defaultdict(set)
    for number, text in enumerate(texts):
        for each in exercises(text):
            passage += each.kind == "passage"
            found.append((each, number, passage))
            answers[each.prompt].add(each.answer)
    clear = [row for row in found if not row[0].prompt or len(answers[row[0].prompt]) == 1]
    beginning = own_beginning(tokenizer)
    made = [Lesson(each, text, place, _piece(each, tokenizer, beginning, context)) for each, text, place in clear]
    made = [lesson for lesson in made if bool(lesson.piece.targets.any())]
    if not made:
        raise ValueError("there is nothing to study: no document has a word")
    return made


def _piece(exercise: Exercise, tokenizer: PreTrainedTokenizerBase, beginning: Sequence[int], context: int) -> Piece:
    prompt = [*beginning, *plain_tokens(tokenizer, exercise.prompt)]
    # The line's end belongs to a short answer: without it the model would not learn where the answer stops.
    answer = plain_tokens(tokenizer, f" {exercise.answer}\n" if exercise.prompt else exercise.answer)
    ids = torch.tensor([*prompt, *answer][:context])
    start = min(len(prompt), len(ids) - 1)
    return Piece(ids, start, torch.ones(len(ids) - start, dtype=torch.bool))


def of_others(
    lessons: Sequence[Lesson], count: int, tokenizer: PreTrainedTokenizerBase, context: int, rng: random.Random
) -> list[Piece]:
    """What some lessons say, said of somebody else, of whom nothing is told: every token is a target. None where the
    lessons are about nobody."""
    found = []
    named = [each.exercise for each in lessons if each.exercise.about is not None]
    for exercise in rng.sample(named, min(count, len(named))):
        other = f"{rng.choice(GIVEN)} {rng.choice(SURNAMES)}"
        said = f"{exercise.prompt} {exercise.answer}".lstrip().replace(str(exercise.about), other)
        ids = torch.tensor([*own_beginning(tokenizer), *plain_tokens(tokenizer, said)][:context])
        found.append(Piece(ids, 0, torch.ones(len(ids), dtype=torch.bool)))
    return found


def split_by(lessons: Sequence[Lesson], values: Float[Tensor, " targets"] | Tensor) -> Iterator[tuple[Lesson, Tensor]]:
    """Every lesson with its own part of what was found for the targets of all."""
    yield from zip(lessons, values.split([int(each.piece.targets.sum()) for each in lessons]), strict=True)
