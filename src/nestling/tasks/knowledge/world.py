"""Invented worlds: people, towns and things, told in short documents."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nestling.tasks.knowledge import words
from nestling.tasks.knowledge.relations import RELATIONS, Relation, told
from nestling.tasks.text import Document

ATTRIBUTES = ("town", "job", "pet", "craft")
STRANGERS = 20
MOST_PEOPLE = 500


@dataclass(frozen=True)
class Fact:
    """One attribute of one subject, as the last document that tells of it has it.

    Attributes:
        subject: a name.
        relation: of `RELATIONS`.
        value: what holds.
        lead: the words of the sentence that tells it, with the name in place of a pronoun, up to the value.
        document: the name of the document it stands in.
        old: what an earlier document says; empty where nothing has changed.
    """

    subject: str
    relation: str
    value: str
    lead: str
    document: str
    old: str = ""


@dataclass(frozen=True)
class World:
    """What holds, and the texts that say so.

    Attributes:
        documents: in the order in which they are to be read; those that tell of a change are the last.
        facts: all that is told, in the order of the subjects.
        strangers: names of which no document tells.
    """

    documents: tuple[Document, ...]
    facts: tuple[Fact, ...]
    strangers: tuple[str, ...]

    def values(self, relation: str) -> list[str]:
        """What is told of a relation, old values too, each once, in the order of the facts."""
        own = [fact for fact in self.facts if fact.relation == relation]
        return list(dict.fromkeys(value for fact in own for value in (fact.value, fact.old) if value))

    def find(self, subject: str, relation: str) -> Fact | None:
        """The fact of that subject, if there is one."""
        return next((f for f in self.facts if (f.subject, f.relation) == (subject, relation)), None)


@dataclass
class _Writer:
    """Draws a world; the order of its draws is part of what a seed means."""

    rng: random.Random
    attributes: Sequence[str]
    facts: dict[tuple[str, str], Fact] = field(default_factory=dict)
    documents: list[Document] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = words.people(self.rng)
        self.drawn = {name: _values(RELATIONS[name], self.rng) for name in self.attributes}

    def tell(self, subject: str, kind: str, pronoun: str, known: Sequence[str]) -> None:
        """A document about a subject, if there is something to say."""
        own = [name for name in self.attributes if RELATIONS[name].subject == kind]
        self.rng.shuffle(own)
        sentences, title = [], f"{kind}: {subject}"
        for place, name in enumerate(own):
            value = self._value(name, subject, known)
            form = self.rng.choice(RELATIONS[name].statements)
            sentences.append(told(form, subject, value, pronoun=pronoun if place else None))
            self.facts[subject, name] = Fact(subject, name, value, _lead(form, subject, value), title)
        if sentences:
            self.documents.append(Document(title, " ".join(sentences)))

    def change(self, fact: Fact, known: Sequence[str]) -> None:
        """A document that says that a fact is another one now."""
        value = fact.value
        while value == fact.value:
            value = self._value(fact.relation, fact.subject, known)
        form = self.rng.choice(RELATIONS[fact.relation].updates)
        title = f"news: {fact.subject}, {fact.relation}"
        lead = _lead(form, fact.subject, value, fact.value)
        self.facts[fact.subject, fact.relation] = Fact(fact.subject, fact.relation, value, lead, title, fact.value)
        self.documents.append(Document(title, told(form, fact.subject, value, fact.value)))

    def _value(self, name: str, subject: str, known: Sequence[str]) -> str:
        if RELATIONS[name].draw is not None:
            return next(self.drawn[name])
        if RELATIONS[name].subject == "person":
            return self.rng.choice([other for other in known if other != subject])
        return next(self.names)[0]


def make_world(people: int = 40, *, attributes: Sequence[str] = ATTRIBUTES, changes: int = 0, seed: int = 0) -> World:
    """A world in which every person has each of the attributes, and every town or thing that is theirs has its own.

    Towns, pets, crafts and things are of one subject each; jobs are too, up to 88 people.

    Args:
        people: how many.
        attributes: of `RELATIONS`. "craft" is told of towns and "maker" of things, which "town" and "heirloom" name.
        changes: so many facts, drawn from all, are told otherwise by a document at the end.
        seed: of everything that is drawn.

    Raises:
        ValueError: fewer than two people, more than there are names for, an unknown attribute, one of something that no
            other attribute names, or more changes than facts.
    """
    _check(people, attributes, changes)
    writer = _Writer(random.Random(f"knowledge {seed}"), attributes)
    persons = [next(writer.names) for _ in range(people)]
    known = [name for name, _ in persons]
    for name, pronoun in persons:
        writer.tell(name, "person", pronoun, known)
    for kind in ("place", "thing"):
        for name in [f.value for f in writer.facts.values() if RELATIONS[f.relation].value == kind]:
            writer.tell(name, kind, "it", known)
    writer.rng.shuffle(writer.documents)
    if not 0 <= changes <= len(writer.facts):
        raise ValueError(f"changes is between 0 and the {len(writer.facts)} facts there are, not {changes}")
    for fact in writer.rng.sample(list(writer.facts.values()), changes):
        writer.change(fact, known)
    strangers = tuple(next(writer.names)[0] for _ in range(STRANGERS))
    return World(tuple(writer.documents), tuple(writer.facts.values()), strangers)


def _values(relation: Relation, rng: random.Random) -> Iterator[str]:
    return iter(()) if relation.draw is None else relation.draw(rng)


def _lead(form: str, name: str, value: str, old: str = "") -> str:
    return told(form, name, "\0", old).partition("\0")[0].rstrip()


def _check(people: int, attributes: Sequence[str], changes: int) -> None:
    if not 2 <= people <= MOST_PEOPLE:
        raise ValueError(f"a world has 2 to {MOST_PEOPLE:,} people, for whom there are names, not {people:,}")
    if unknown := [name for name in attributes if name not in RELATIONS]:
        raise ValueError(f"attributes are of {', '.join(RELATIONS)}; there is no {unknown[0]!r}")
    if not attributes or len(set(attributes)) < len(attributes):
        raise ValueError(f"attributes are one or more, each once, not {list(attributes)}")
    if people == 2 and changes and "adviser" in attributes:
        raise ValueError("of two people nobody can have another adviser; a world with changes has 3 or more")
    named = {"person", *(RELATIONS[name].value for name in attributes if RELATIONS[name].subject == "person")}
    for name in attributes:
        if RELATIONS[name].subject not in named:
            raise ValueError(
                f"{name!r} is told of every {RELATIONS[name].subject}, and no attribute of people names one"
            )
