"""What can be told of a person, a town or a thing, and the English for telling it and asking after it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nestling.tasks.knowledge import words


@dataclass(frozen=True)
class Relation:
    """One attribute.

    Sentences have `{who}` and `{whose}` for the subject (a name, or she, her and so on), `{value}` once, behind them,
    and `{old}` where something has changed. The others have `{name}`, which may be a name or a phrase.

    Attributes:
        subject: whose it is: "person", "place" or "thing".
        value: what it is: one of these, or "word", of which nothing more can be asked.
        statements: sentences of documents.
        updates: sentences of documents that tell of a change.
        paraphrases: other words than those, up to the value.
        questions: whole questions.
        reverses: texts that lead from `{value}` to the name.
        phrase: what names the value without saying it.
        draw: values, from a random generator; None where they are names of what the world has (`value`).
    """

    subject: str
    value: str
    statements: tuple[str, ...]
    updates: tuple[str, ...]
    paraphrases: tuple[str, ...]
    questions: tuple[str, ...]
    reverses: tuple[str, ...]
    phrase: str
    draw: Callable[[random.Random], Iterator[str]] | None = None


RELATIONS: dict[str, Relation] = {
    "town": Relation(
        "person",
        "place",
        (
            "{who} lives in {value}.",
            "{who} has lived in {value} for many years.",
            "{whose} house stands in {value}.",
            "{who} moved as a child to {value}.",
            "{who} rents two rooms in {value}.",
            "The door with {whose} name on it is in {value}.",
        ),
        (
            "{who} has left {old} and lives in {value} now.",
            "Since the spring {whose} home is no longer in {old}, but in {value}.",
            "{who} packed everything, said goodbye to {old}, and settled in {value}.",
        ),
        (
            "The town in which {name} is at home is",
            "If you want to visit {name}, take the road to",
            "Letters to {name} are sent to",
        ),
        (
            "In which town does {name} live?",
            "Where does {name} live?",
            "What is the home town of {name}?",
        ),
        (
            "The person who lives in {value} is",
            "In {value} you can meet",
            "Among the people of {value} is",
        ),
        "the home town of {name}",
        words.towns,
    ),
    "job": Relation(
        "person",
        "word",
        (
            "{who} works as {value}.",
            "{who} earns a living as {value}.",
            "{whose} trade is that of {value}.",
            "{who} has long been {value}.",
            "Everyone there knows {who_} as {value}.",
            "{who} learned early to be {value}.",
        ),
        (
            "{who} has given up being {old} and is {value} now.",
            "Since the spring {who} is no longer {old}, but {value}.",
            "{who} used to be {old}; today {who} works as {value}.",
        ),
        (
            "The profession of {name} is that of",
            "When asked for an occupation, {name} writes:",
            "By profession, {name} is",
        ),
        (
            "What does {name} do for a living?",
            "What is the job of {name}?",
            "What work does {name} do?",
        ),
        (
            "The person who works as {value} is",
            "Whoever needs {value} asks for",
            "The name of the one who is {value} is",
        ),
        "the job of {name}",
        words.jobs,
    ),
    "pet": Relation(
        "person",
        "word",
        (
            "{who} keeps {value}.",
            "{who} is never seen without {value}.",
            "{who} shares the kitchen with {value}.",
            "At {whose} feet sleeps {value}.",
            "{whose} companion is {value}.",
            "{who} found and raised {value}.",
        ),
        (
            "{who} no longer has {old}; now there is {value}.",
            "After {old} died, {who} took in {value}.",
            "{who} gave {old} away and got {value}.",
        ),
        (
            "The animal in the home of {name} is",
            "As a pet, {name} has",
            "The animal that belongs to {name} is",
        ),
        (
            "What pet does {name} have?",
            "Which animal does {name} keep?",
            "What is the pet of {name}?",
        ),
        (
            "The owner of {value} is",
            "The animal, {value}, belongs to",
            "The person who keeps {value} is",
        ),
        "the pet of {name}",
        words.pets,
    ),
    "adviser": Relation(
        "person",
        "person",
        (
            "{who} decides nothing without {value}.",
            "{whose} adviser in everything is {value}.",
            "{who} takes every question to {value}.",
            "{who} trusts nobody's advice but that of {value}.",
        ),
        (
            "{who} no longer asks {old} for advice, but {value}.",
            "The adviser of {who_} is no longer {old}, but {value}.",
        ),
        (
            "When in doubt, {name} goes to",
            "The one whose advice {name} follows is",
            "The counsel that {name} listens to is that of",
        ),
        (
            "Who is the adviser of {name}?",
            "Whom does {name} ask for advice?",
        ),
        (
            "The person who asks {value} for advice is",
            "The one who is advised by {value} is",
        ),
        "the adviser of {name}",
    ),
    "heirloom": Relation(
        "person",
        "thing",
        (
            "{who} inherited {value}.",
            "On {whose} shelf stands an heirloom, {value}.",
            "{whose} grandmother left behind {value}.",
            "{who} would sell everything but an heirloom, {value}.",
        ),
        (
            "{who} sold {old} and inherited {value}.",
            "Instead of {old}, {whose} heirloom is {value} now.",
        ),
        (
            "The family treasure of {name} is",
            "What has come down to {name} is",
        ),
        (
            "What is the heirloom of {name}?",
            "Which heirloom does {name} have?",
        ),
        (
            "The person who inherited {value} is",
            "The owner of an heirloom, {value}, is",
        ),
        "the heirloom of {name}",
        words.things,
    ),
    "craft": Relation(
        "place",
        "word",
        (
            "{who} is known for its {value}.",
            "People come from afar to {who} for its {value}.",
            "{who} has always made {value}.",
            "{who} sells nothing so well as its {value}.",
            "The pride of {who} is its {value}.",
        ),
        (
            "{who} no longer makes {old}, but {value}.",
            "{who} was known for its {old}; today it is known for its {value}.",
        ),
        (
            "The market of {name} is full of",
            "What every visitor brings back from {name} is",
        ),
        (
            "What is {name} known for?",
            "What is made in {name}?",
        ),
        (
            "The town that is known for its {value} is",
            "The place where they make {value} is",
        ),
        "what {name} is known for",
        words.crafts,
    ),
    "maker": Relation(
        "thing",
        "person",
        (
            "{who} was made by {value}.",
            "{who} bears the mark of {value}.",
            "{who} is the work of {value}.",
        ),
        (
            "{who} was long thought to be by {old}, but its maker was {value}.",
            "Experts say that {who} was made not by {old}, but by {value}.",
        ),
        (
            "The craftsman behind {name} was",
            "The one who built {name} is called",
        ),
        (
            "Who made {name}?",
            "Whose work is {name}?",
        ),
        (
            "The thing that was made by {value} is",
            "The work that {value} left behind is",
        ),
        "the maker of {name}",
    ),
}
"""By name. A world has those it is made with."""

UNTOLD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "birthday": (("In which month was {name} born?", "In which month is the birthday of {name}?"), words.MONTHS),
    "instrument": (("Which instrument does {name} play?", "What instrument has {name} learned?"), words.INSTRUMENTS),
    "colour": (("What is the favourite colour of {name}?", "Which colour does {name} like most?"), words.COLOURS),
}
"""What no document says of anybody: questions, and answers that sound likely."""

PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "his", "him"), "it": ("it", "its", "it")}


def told(sentence: str, name: str, value: str, old: str = "", pronoun: str | None = None) -> str:
    """A sentence of a document, of the name or of the pronoun in its place."""
    who, whose, whom = PRONOUNS[pronoun] if pronoun else (name, f"{name}'s", name)
    text = sentence.format(who=who, whose=whose, who_=whom, value=value, old=old)
    return text[0].upper() + text[1:]
