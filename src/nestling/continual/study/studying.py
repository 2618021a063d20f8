"""Learning a text until it is known (study)."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedTokenizerBase

from nestling.continual.component import Bounds, Companion
from nestling.continual.learner.earlier import open_adapter
from nestling.continual.learner.gradients import take_gradients
from nestling.continual.learner.guards import check_not_diverged
from nestling.continual.learner.weights import LevelWeights, LowRankWeights
from nestling.continual.replay.auxiliary_losses import taught_by
from nestling.continual.store.records import DocumentRecord
from nestling.continual.store.texts import text_digest
from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.scoring import learning
from nestling.continual.stream.tokenizing import plain_tokens
from nestling.continual.study.curriculum import Curriculum
from nestling.continual.study.lessons import Lesson, of_others, split_by
from nestling.continual.study.preparing import goes_on, inside, lessons_for, own_text, preservation_of, scope_for
from nestling.continual.study.preservation import Preservation
from nestling.continual.study.settings import Study

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner

LIKELY = math.log(2)
"""A token of less loss is likelier than all others together: it is known."""
OTHERS = 4
"""Exercises a step said of other people, where the memory speaks everywhere."""
WARM_UP, LEAST = 0.1, 0.1  # of the rounds; of the rate
RATE_OF_RANKS, RATE_OF_WEIGHTS = 2e-3, 3e-4
CLIP = 1.0
PASS = 160
"""Tokens of one forward pass over exercises: more of them would be padding."""


@dataclass(frozen=True)
class Step:
    """Exercises were learned from.

    Attributes:
        round, of: this round, from 1, and how many there are at most.
        exercises: of the step.
        left: exercises of this round that are still to come.
        tokens: of the step, what was read and not learned from included.
        loss: mean of the targets before learning, nats.
        known: share of all exercises that were done at their last visit.
    """

    round: int
    of: int
    exercises: int
    left: int
    tokens: int
    loss: float
    known: float


@dataclass
class Studied:
    """What a study came to.

    Attributes:
        exercises: that there are.
        left_out: more of them, which the memory's scope does not reach.
        known: share of them done at their last visit, after each round.
        steps: taken.
        tokens: read in all rounds.
        finished: whether it ended by itself: all rounds, or as much known as was asked for.
        seconds: what it took, preparation included.
        changed: share of the layers' outputs on the model's own text that is changed, summed over the layers; NaN for
            full weights.
    """

    exercises: int
    left_out: int = 0
    known: list[float] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    finished: bool = False
    seconds: float = 0.0
    changed: float = math.nan


@dataclass(frozen=True)
class Events:
    """Who is told of a study while it goes on.

    Attributes:
        step: after every step; what it raises ends the study, and what was learned until then stays.
        round: after every round, which is a good place to save a memory.
        writing: how many tokens are written of the text that is to be preserved, where there is none yet.
    """

    step: Callable[[Step], object] = lambda _: None
    round: Callable[[Studied], object] = lambda _: None
    writing: Callable[[int], object] = lambda _: None


def study(
    learner: Learner,
    texts: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    settings: Study,
    events: Events,
) -> Studied:
    """Repeat exercises made of texts until they are known:

        mean loss of the exercises' answers
        + preserve * changed share of the layers' outputs on the model's own text
        + specific * KL(base || model) on exercises that are said of other people
        + what the learner rehearses

    by AdamW. The levels learn together, without their periods; their own optimizers keep their states. Within a scope
    every study has an adapter of its own, beside those of earlier studies, which speak and stay as they are; one that
    was left before its end is gone on with.

    Args:
        learner: attached.
        texts: what is to be known, by name.
        tokenizer: of the learner's model.
        settings: how.
        events: who is told.

    Raises:
        ValueError: texts without a word, or nothing to be learned within a scope; `everywhere` for a memory that has
            one.
        LearningDivergedError: the weights are no longer finite.
        RuntimeError: the learner is detached.
    """
    began = time.monotonic()
    learner.check_at_work()
    lessons, before = lessons_for(learner, settings, list(texts.values()), tokenizer), learner.scope
    made, own = len(lessons), own_text(learner, settings, events.writing)
    scope = scope_for(learner, settings, lessons, tokenizer, own)
    another = before is not None and not goes_on(learner)
    if scope is not None:
        others = [*(each.scope for each in learner.earlier.adapters), *((before,) if another and before else ())]
        lessons = inside(lessons, scope, others)
    course = _Course(learner, lessons, tokenizer, settings, preservation_of(learner, settings, own))
    done, undo = Studied(len(lessons), made - len(lessons)), lambda: learner.set_scope(before)
    record = _Record(learner, texts, tokenizer, course)
    try:
        if another:
            undo = open_adapter(learner)
        learner.set_scope(scope)
        with nullcontext() if course.preserved is None else course.preserved.coordinates():
            course.begin()
            for number in range(settings.rounds):
                for step in course.round(number):
                    done.steps, done.tokens = done.steps + 1, done.tokens + step.tokens
                    events.step(step)
                done.known.append(course.curriculum.known)
                done.changed, done.seconds = course.changed(), time.monotonic() - began
                if number + 1 == settings.rounds or course.curriculum.known >= settings.until:
                    done.finished = True
                    break
                record.write(done)
                events.round(done)
    finally:
        if not done.steps:
            undo()
        learner.weights_replaced()
        record.write(done)
    events.round(done)
    return done


class _Course:
    """A study under way.

    Attributes:
        texts: number of the text of every passage.
        first: of every passage read, the losses of its tokens when it was met first.
    """

    def __init__(
        self,
        learner: Learner,
        lessons: Sequence[Lesson],
        tokenizer: PreTrainedTokenizerBase,
        settings: Study,
        preserved: Preservation | None,
    ) -> None:
        self.learner, self.lessons, self.tokenizer = learner, lessons, tokenizer
        self.settings, self.preserved = settings, preserved
        self.rng = random.Random(f"others {settings.seed}")
        self.curriculum = Curriculum([lesson.passage for lesson in lessons], settings.most, settings.seed)
        self.texts = {lesson.passage: lesson.text for lesson in lessons}
        self.first: dict[int, Tensor] = {}

    def begin(self) -> None:
        """Make the optimizer, of the weights as they are learned now."""
        levels = self.learner.weights.values()
        self.parameters = [p for weights in levels for p in weights.learned]
        groups = [{"params": weights.learned, "rate": self._rate(weights)} for weights in levels]
        self.optimizer = AdamW(groups, betas=self.learner.settings.options.betas, weight_decay=0.0)

    def _rate(self, weights: LevelWeights) -> float:
        if self.settings.lr is not None:
            return self.settings.lr
        return RATE_OF_RANKS if isinstance(weights, LowRankWeights) else RATE_OF_WEIGHTS

    def changed(self) -> float:
        """See `Studied`."""
        return math.nan if self.preserved is None else float(self.preserved.changed().detach())

    def round(self, number: int) -> Iterator[Step]:
        """One, step by step."""
        order, settings, place = self.curriculum.round(number), self.settings, 0
        for chosen in self._batches(order):
            lessons = [self.lessons[i] for i in chosen]
            share = (number + place / len(order)) / settings.rounds
            for group in self.optimizer.param_groups:
                group["lr"] = group["rate"] * warm_cosine(share)
            losses = self._learn(lessons)
            for i, (lesson, own) in zip(chosen, split_by(lessons, losses), strict=True):
                self.curriculum.saw(i, number, lesson.done(own < LIKELY))
                if lesson.exercise.kind == "passage":
                    self.first.setdefault(lesson.passage, own)
            place += len(chosen)
            tokens, left = sum(len(each.piece.ids) for each in lessons), len(order) - place
            mean, known = float(losses.mean()), self.curriculum.known
            yield Step(number + 1, settings.rounds, len(chosen), left, tokens, mean, known)

    def _batches(self, order: Sequence[int]) -> list[list[int]]:
        """As they come, each with its exercises by length: those of about one length are read in one pass, with little
        padding. A step of one length alone would be of one kind alone, and read few tokens as dearly as many."""
        size = self.settings.batch
        parts = [order[place : place + size] for place in range(0, len(order), size)]
        return [sorted(part, key=lambda i: len(self.lessons[i].piece.ids)) for part in parts]

    def _learn(self, lessons: Sequence[Lesson]) -> Tensor:
        """One step; losses of the targets before it."""
        learner, parameters = self.learner, self.parameters
        beside = [companion for each in learner.components.values() for companion in each.companions()]
        beside += self._of_others(lessons)
        pieces, budget = [lesson.piece for lesson in lessons], min(PASS, learner.settings.options.batch_tokens)
        with learning(learner.model, parameters):
            seen = take_gradients(learner.reader, pieces, beside, budget, learner.guard, Bounds(), {"all": parameters})
            if seen.refusal is None:
                if self.preserved is not None:
                    (self.settings.preserve * self.preserved.changed()).backward()
                torch.nn.utils.clip_grad_norm_(parameters, CLIP)
                self.optimizer.step()
        check_not_diverged(parameters, int(seen.refusal is not None), 0, seen.refusal or "")
        return seen.losses

    def _of_others(self, lessons: Sequence[Lesson]) -> list[Companion]:
        settings, learner = self.settings, self.learner
        context = learner.settings.context
        count = (OTHERS if learner.scope is None else 0) if settings.others is None else settings.others
        pieces = of_others(lessons, count, self.tokenizer, context, self.rng)
        taught = taught_by(learner, learner.base_weights)

        def losses(some: Sequence[Piece]) -> Tensor:
            # Of others the memory would be silent: what it would say of them is what shall not be learned.
            with learner.gate.everywhere():
                return taught(some)

        return [Companion(pieces, settings.specific, losses)] if pieces and settings.specific else []


def warm_cosine(share: float) -> float:
    """Of the highest rate, at this share of the rounds."""
    warm = min(1.0, share / WARM_UP + LEAST)
    return warm * (LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * share)))


class _Record:
    """What is being studied, in the learner's log: written anew after every round, so that a memory that is saved then
    tells of it."""

    def __init__(
        self, learner: Learner, texts: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, course: _Course
    ) -> None:
        self.learner, self.texts, self.tokenizer, self.course = learner, texts, tokenizer, course
        self.digests = [text_digest(text) for text in texts.values()]
        self.begun: int | None = None
        self.studies = len(learner.studies)
        self.started = datetime.now(UTC).isoformat(timespec="seconds")

    def write(self, studied: Studied) -> None:
        """Nothing where no step was taken."""
        if not studied.steps:
            return
        log = self.learner.log
        log.end(finished=False)
        self.learner.stream.end_document()
        if self.begun is None:
            self.begun = len(log.records)
        del log.records[self.begun :], self.learner.studies[self.studies :]
        read = {record.digest for record in log.records if record.finished}
        names = zip(self.texts.items(), self.digests, strict=True)
        for number, ((name, text), digest) in enumerate(names):
            if digest not in read:
                log.records.append(self._of(number, name, text, digest, studied.finished))
        self.learner.studies.append(
            {
                "digests": self.digests,
                "settings": asdict(self.course.settings),
                "steps": studied.steps,
                "finished": studied.finished,
                "records": self.begun,
                "added": len(log.records) - self.begun,
            }
        )

    def _of(self, number: int, name: str, text: str, digest: str, finished: bool) -> DocumentRecord:
        course = self.course
        losses = [own for place, own in course.first.items() if course.texts[place] == number]
        mean = float(torch.cat(losses).mean()) if losses else 0.0
        tokens = len(plain_tokens(self.tokenizer, text)) if finished else 0
        return DocumentRecord(name, digest, tokens, finished, mean, self.started)
