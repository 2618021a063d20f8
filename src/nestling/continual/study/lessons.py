"""Exercises as tokens."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestling.continual.store.scope import Scope
from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.tokenizing import own_beginning, plain_tokens
from nestling.continual.study.chains import chains
from nestling.continual.study.changes import amended
from nestling.continual.study.english import GIVEN, SURNAMES
from nestling.continual.study.exercises import Exercise, names_in, of_passage, subject
from nestling.continual.study.kinds import Kinds, of_kinds

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


@dataclass(frozen=True)
class Told:
    """A passage as it is to be believed.

    Attributes:
        text: number of the text it is of.
        passage: itself.
        about: its subject; None where it is about nobody in particular.
    """

    text: int
    passage: str
    about: str | None


def tell(texts: Sequence[str]) -> list[Told]:
    """The passages of some texts. What a later text changes is changed in the earlier ones (`amended`).

    Args:
        texts: whole documents, in the order in which they are to be believed.
    """
    names = names_in(texts)
    found = ((number, passage) for number, own in enumerate(amended(texts, names)) for passage in own)
    return [Told(number, passage, subject(passage, names)) for number, passage in found]


def make_lessons(
    told: Sequence[Told], tokenizer: PreTrainedTokenizerBase, context: int, kinds: Kinds = MappingProxyType({})
) -> list[Lesson]:
    """The exercises of some passages. A question that two passages answer differently is left out: nobody could know
    which is meant.

    Args:
        told: passages.
        tokenizer: of the model that shall learn them.
        context: tokens of a piece at most; what is longer is cut.
        kinds: of what the passages say.

    Raises:
        ValueError: passages without a word.
    """
    about = [(each.passage, each.about) for each in told]
    answers: dict[str, set[str]] = defaultdict(set)
    found: dict[Exercise, tuple[int, int]] = {}
    for place, (own, more) in enumerate(zip(told, chains(about, kinds), strict=True)):
        asked = [] if own.about is None else of_kinds(own.passage, own.about, kinds)
        for each in (*of_passage(own.passage, own.about), *asked, *more):
            found.setdefault(each, (own.text, place))
            answers[each.prompt].add(each.answer)
    clear = [(each, *where) for each, where in found.items() if not each.prompt or len(answers[each.prompt]) == 1]
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


def within(lessons: Sequence[Lesson], scope: Scope, others: Sequence[Scope] = ()) -> list[Lesson]:
    """Of some lessons what an adapter with this scope, beside those with others, can learn: answers it speaks at, and
    of what is read as it is the tokens it speaks at."""
    found = []
    for lesson in lessons:
        piece = spoken(lesson.piece, scope, others)
        whole = piece is not None and bool((piece.targets == lesson.piece.targets).all())
        if piece is not None and (whole or lesson.exercise.kind in READ):
            found.append(replace(lesson, piece=piece))
    return found


def spoken(piece: Piece, scope: Scope, others: Sequence[Scope] = ()) -> Piece | None:
    """With those targets alone that an adapter with this scope has a say in; None where there is none."""
    speaks = torch.tensor([False, *scope.speaking(piece.ids.tolist(), others)])  # of what comes after each token
    said = piece.targets & speaks[piece.start : piece.start + len(piece)]
    return replace(piece, scored=said) if bool(said.any()) else None


def split_by(lessons: Sequence[Lesson], values: Float[Tensor, " targets"] | Tensor) -> Iterator[tuple[Lesson, Tensor]]:
    """Every lesson with its own part of what was found for the targets of all."""
    yield from zip(lessons, values.split([int(each.piece.targets.sum()) for each in lessons]), strict=True)
