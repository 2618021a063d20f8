"""What a study takes before it begins: its exercises, text of the model's own, what preserves it, and the scope."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestling.continual.learner.weights import LowRankWeights
from nestling.continual.replay.rehearsal import RehearsedText, write
from nestling.continual.store.scope import Scope
from nestling.continual.stream.scoring import learning
from nestling.continual.study.cues import make_scope
from nestling.continual.study.kinds import ask_kinds, phrases
from nestling.continual.study.lessons import Lesson, make_lessons, tell, within
from nestling.continual.study.preservation import Preservation
from nestling.continual.study.settings import Study

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner

SHAPE = (64, 96)
"""Pieces and tokens of the text that is preserved, where the learner rehearses none."""


def own_text(learner: Learner, settings: Study, on_token: Callable[[int], object]) -> Tensor | None:
    """The text that is rehearsed, or such text written for this; None where it is not asked for."""
    if not _low(learner) or not (settings.preserve or speaks_within(learner, settings)):
        return None
    written = learner.component(RehearsedText)
    if written is not None:
        return written.write(on_token)
    with learner.base_weights():
        return write(learner, *SHAPE, settings.seed, on_token)


def lessons_for(
    learner: Learner, settings: Study, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Lesson]:
    """Exercises, the base model having been asked for kinds; raises as `make_lessons`."""
    told = tell(texts)
    asked = phrases([(each.passage, each.about) for each in told]) if settings.kinds else []
    with learner.base_weights(), learning(learner.model, ()):
        kinds = ask_kinds(asked, learner.reader, tokenizer, settings.kinds, learner.settings.context)
    return make_lessons(told, tokenizer, learner.settings.context, kinds)


def preservation_of(learner: Learner, settings: Study, own: Tensor | None) -> Preservation | None:
    """Of the low-rank levels."""
    if own is None or not settings.preserve:
        return None
    with learner.base_weights():
        return Preservation(learner.model, _low(learner), own)


def speaks_within(learner: Learner, settings: Study) -> bool:
    """Whether what is studied gets a scope. A memory that has learned what acts everywhere goes on without one."""
    if learner.scope is not None and settings.everywhere:
        raise ValueError(
            "this memory has a scope, outside of which it is silent, and what shall act everywhere cannot be studied "
            "into it; begin another memory"
        )
    counters = learner.counters
    begun = counters.tokens or counters.adopted or learner.studies
    new = not begun and not settings.everywhere and len(_low(learner)) == len(learner.weights)
    return learner.scope is not None or bool(new)


def goes_on(learner: Learner) -> bool:
    """Whether a study goes on with the adapter of the one before, which was left before its end."""
    return bool(learner.studies) and not learner.studies[-1]["finished"]


def scope_for(
    learner: Learner,
    settings: Study,
    lessons: Sequence[Lesson],
    tokenizer: PreTrainedTokenizerBase,
    own: Tensor | None,
) -> Scope | None:
    """Of these lessons; of what an unfinished study has begun as well, where this one goes on with it."""
    if not speaks_within(learner, settings):
        return None
    assert own is not None
    passages = [lesson.exercise.answer for lesson in lessons if lesson.exercise.kind == "passage"]
    with learner.base_weights(), learning(learner.model, ()):
        scope = make_scope(passages, learner.reader, tokenizer, own)
    return learner.scope.joined(scope) if learner.scope is not None and goes_on(learner) else scope


def inside(lessons: Sequence[Lesson], scope: Scope, others: Sequence[Scope]) -> list[Lesson]:
    """Raises ValueError where the scope leaves nothing to learn."""
    found = within(lessons, scope, others)
    if not found:
        raise ValueError(
            "no word of these texts is rare enough to tell them from other text, so a memory of them would be silent; "
            "study them with everywhere=True (--everywhere)"
        )
    return found


def _low(learner: Learner) -> list[LowRankWeights]:
    return [weights for weights in learner.weights.values() if isinstance(weights, LowRankWeights)]
