"""Questions about an invented world, with answers to choose from."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nestling.tasks.knowledge.relations import RELATIONS, UNTOLD
from nestling.tasks.knowledge.world import Fact, World

NOT_TOLD = "I was not told."
"""The answer that says so."""


@dataclass(frozen=True)
class KnowledgeQuestion:
    """One question.

    Attributes:
        kind: of `KINDS`; of a real text (`sources`) what kind of text it is.
        relation: what is asked for; of two hops both, with a comma.
        subject: of whom or what.
        prompt: a question, or a text to be gone on with.
        choices: answers, without a space before them.
        gold: index of the right one.
        documents: names of those that together say it; none of an absence.
    """

    kind: str
    relation: str
    subject: str
    prompt: str
    choices: tuple[str, ...]
    gold: int
    documents: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The right one."""
        return self.choices[self.gold]

    @property
    def asks(self) -> bool:
        """Whether the prompt is a question, and not the beginning of a sentence."""
        return self.prompt.endswith("?")


def ask_world(
    world: World, kinds: Sequence[str] | None = None, *, choices: int | None = 10, seed: int = 0
) -> list[KnowledgeQuestion]:
    """Questions of the kinds named, one per fact and kind where there is one.

    What a later document tells otherwise is asked as "update" alone, with the old value among the answers. Wrong
    answers are values of the same relation in the same world, so that having read the words is not enough.

    Args:
        world: asked about.
        kinds: of `KINDS`; None is all.
        choices: answers of a question, as far as the world has so many; None is all it has. Of an absence there are so
            many and `NOT_TOLD`.
        seed: of wording and choices.

    Raises:
        ValueError: an unknown kind, or fewer than two answers to choose from.
    """
    if unknown := [kind for kind in kinds or () if kind not in KINDS]:
        raise ValueError(f"kinds are {', '.join(KINDS)}; there is no {unknown[0]!r}")
    if choices is not None and choices < 2:
        raise ValueError(f"a question has at least 2 answers to choose from, not {choices}")
    asker = _Asker(world, choices, seed)
    return [question for kind in (kinds or KINDS) for question in KINDS[kind](asker, kind)]


def among(
    right: str, others: Sequence[str], count: int | None, rng: random.Random, also: str = ""
) -> tuple[tuple[str, ...], int]:
    """The right answer at a drawn place among others, `count` in all, as far as there are so many.

    Args:
        right: the answer.
        others: what the wrong ones are drawn from; it may hold the right one too.
        count: None is all there are.
        rng: of the draw.
        also: a wrong one that is there in any case; empty for none.
    """
    always = [also] if also else []
    free = [other for other in dict.fromkeys(others) if other not in (right, also)]
    most = len(free) if count is None else count - 1 - len(always)
    found = [right, *always, *rng.sample(free, min(most, len(free)))]
    rng.shuffle(found)
    return tuple(found), found.index(right)


@dataclass
class _Asker:
    world: World
    choices: int | None
    seed: int

    def __post_init__(self) -> None:
        self.rng = random.Random(f"questions {self.seed}")
        self.standing = [fact for fact in self.world.facts if not fact.old]

    def same_words(self, kind: str) -> Iterator[KnowledgeQuestion]:
        """The sentence that tells it, up to the value."""
        for fact in self.standing:
            yield self._of(kind, fact, fact.lead)

    def paraphrase(self, kind: str) -> Iterator[KnowledgeQuestion]:
        """A sentence that no document has."""
        for fact in self.standing:
            yield self._of(kind, fact, self._word(RELATIONS[fact.relation].paraphrases, fact.subject))

    def question(self, kind: str) -> Iterator[KnowledgeQuestion]:
        """A question."""
        for fact in self.standing:
            yield self._of(kind, fact, self._word(RELATIONS[fact.relation].questions, fact.subject))

    def reversed(self, kind: str) -> Iterator[KnowledgeQuestion]:
        """From the value to the name, where the value is one subject's alone."""
        counts = Counter((fact.relation, value) for fact in self.world.facts for value in (fact.value, fact.old))
        for fact in self.standing:
            if counts[fact.relation, fact.value] > 1:
                continue
            prompt = self.rng.choice(RELATIONS[fact.relation].reverses).format(value=fact.value)
            others = [f.subject for f in self.world.facts if f.relation == fact.relation and f.subject not in prompt]
            choices, gold = among(fact.subject, others, self.choices, self.rng)
            yield KnowledgeQuestion(kind, fact.relation, fact.subject, prompt, choices, gold, (fact.document,))

    def two_hops(self, kind: str) -> Iterator[KnowledgeQuestion]:
        """What another document tells of the value that one document tells."""
        for first in self.standing:
            for name in RELATIONS:
                second = self.world.find(first.value, name)
                if second is None or second.old or second.value == first.subject:
                    continue
                through = RELATIONS[first.relation].phrase.format(name=first.subject)
                found = self._of(kind, second, self._word(RELATIONS[name].questions, through), (first.value,))
                relation, both = f"{first.relation}, {name}", (first.document, second.document)
                yield KnowledgeQuestion(kind, relation, first.subject, found.prompt, found.choices, found.gold, both)

    def absence(self, kind: str) -> Iterator[KnowledgeQuestion]:
        """What is told of nobody, and what is told of others but not of this one."""
        people = [f.subject for f in self.standing if RELATIONS[f.relation].subject == "person"]
        for name in dict.fromkeys(people):
            relation = self.rng.choice(list(UNTOLD))
            prompts, answers = UNTOLD[relation]
            yield self._absent(kind, relation, name, self._word(prompts, name), answers)
        told = [f.relation for f in self.standing if RELATIONS[f.relation].subject == "person"]
        for name in self.world.strangers if told else ():
            relation = self.rng.choice(list(dict.fromkeys(told)))
            prompt = self._word(RELATIONS[relation].questions, name)
            yield self._absent(kind, relation, name, prompt, self.world.values(relation))

    def update(self, kind: str) -> Iterator[KnowledgeQuestion]:
        """What holds now, of what has changed."""
        for fact in self.world.facts:
            if fact.old:
                yield self._of(kind, fact, self._word(RELATIONS[fact.relation].questions, fact.subject))

    def _of(self, kind: str, fact: Fact, prompt: str, never: Sequence[str] = ()) -> KnowledgeQuestion:
        """With answers that are neither named in the prompt nor among `never`."""
        others = [v for v in self.world.values(fact.relation) if v not in prompt and v not in never]
        choices, gold = among(fact.value, others, self.choices, self.rng, fact.old)
        return KnowledgeQuestion(kind, fact.relation, fact.subject, prompt, choices, gold, (fact.document,))

    def _absent(self, kind: str, relation: str, name: str, prompt: str, answers: Sequence[str]) -> KnowledgeQuestion:
        # As many answers of the world as the others have, and the right one.
        choices, gold = among(NOT_TOLD, answers, None if self.choices is None else self.choices + 1, self.rng)
        return KnowledgeQuestion(kind, relation, name, prompt, choices, gold, ())

    def _word(self, forms: Sequence[str], name: str) -> str:
        text = self.rng.choice(forms).format(name=name)
        return text[0].upper() + text[1:]


KINDS: dict[str, Callable[[_Asker, str], Iterator[KnowledgeQuestion]]] = {
    "same words": _Asker.same_words,
    "paraphrase": _Asker.paraphrase,
    "question": _Asker.question,
    "reversed": _Asker.reversed,
    "two hops": _Asker.two_hops,
    "absence": _Asker.absence,
    "update": _Asker.update,
}
"""By name."""
