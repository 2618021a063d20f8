"""Questions about real texts: a dictionary's words, the names in a book, stories of bAbI."""

from __future__ import annotations

import csv
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nestling.errors import UserError
from nestling.tasks.knowledge import words
from nestling.tasks.knowledge.questions import KnowledgeQuestion, among
from nestling.tasks.text import Document

BABI_PEOPLE = dict.fromkeys(("Bill", "Daniel", "Fred", "Jeff", "John"), "he") | dict.fromkeys(
    ("Julie", "Mary", "Sandra"), "she"
)
_SENTENCE = re.compile(r"(?<=[.!?])[\"”’']?\s+")
_WORD = re.compile(r"[^\W\d_][\w’' ]*\w")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}(?![\w’'-])")
_FEWEST_WORDS = 6


@dataclass(frozen=True)
class Material:
    """What is to be read, and what is asked about it."""

    documents: tuple[Document, ...]
    questions: tuple[KnowledgeQuestion, ...]


def dictionary_material(
    entries: str | Path,
    senses: str | Path,
    language: str,
    items: int | None = None,
    *,
    choices: int = 10,
    seed: int = 0,
) -> Material:
    """Words of a dictionary in CLDF (Cross-Linguistic Data Formats), a document each, asked both ways.

    Entries with one sense alone are taken, and of these the words and meanings that come once. Parts of words, and
    notes in brackets in place of a meaning, are left out.
    "What does ... mean?" is of the kind "meaning", from the meaning to the word of the kind "word".

    Args:
        entries: `entries.csv`.
        senses: `senses.csv`.
        language: its name, as questions say it.
        items: words, drawn from all; None is all.
        choices: answers of a question.
        seed: of what is drawn.

    Raises:
        UserError: a file that cannot be read or has other columns, or fewer than two words.
    """
    rng = random.Random(f"dictionary {seed}")
    pairs = _words_of(entries, senses)
    pairs = pairs if items is None else rng.sample(pairs, min(items, len(pairs)))
    if len(pairs) < 2:
        raise UserError(f"{entries} and {senses} have fewer than two words with one meaning; give a whole dictionary")
    heads, meanings = [head for head, _ in pairs], [meaning for _, meaning in pairs]
    documents, asked = [], []
    for head, meaning in pairs:
        title = f"{language}: {head}"
        documents.append(Document(title, f"In {language}, the word “{head}” means “{meaning}”."))
        for kind, prompt, right, others in (
            ("meaning", f"What does the {language} word “{head}” mean?", meaning, meanings),
            ("word", f"What is the {language} word for “{meaning}”?", head, heads),
        ):
            found, gold = among(right, others, choices, rng)
            asked.append(KnowledgeQuestion(kind, "meaning", head, prompt, found, gold, (title,)))
    return Material(tuple(documents), tuple(asked))


def name_material(document: Document, items: int | None = None, *, choices: int = 10, seed: int = 0) -> Material:
    """Sentences of a text that a name stands in, to be gone on with from there, of the kind "name".

    A name is a capitalised word inside a sentence that the text never has in small letters, and has three times.

    Args:
        document: the text.
        items: sentences, drawn from all; None is all.
        choices: names to choose from, all of the text.
        seed: of what is drawn.

    Raises:
        UserError: fewer than two names.
    """
    rng = random.Random(f"names {seed}")
    small = set(re.findall(r"(?<!\w)[a-z]+", document.text))
    counts = Counter(name for name in _NAME.findall(document.text) if name.lower() not in small)
    names = sorted(name for name, count in counts.items() if count >= 3)
    if len(names) < 2:
        raise UserError(f"{document.name} has fewer than two names that come three times; give a longer text")
    found = list(dict.fromkeys(_ends_in_names(document.text, set(names))))
    if items is not None:
        found = rng.sample(found, min(items, len(found)))
    asked = []
    for prompt, name in found:
        answers, gold = among(name, names, choices, rng)
        asked.append(KnowledgeQuestion("name", "name", name, prompt, answers, gold, (document.name,)))
    return Material((document,), tuple(asked))


def story_material(path: str | Path, stories: int | None = None, *, choices: int = 10, seed: int = 0) -> Material:
    """Stories of bAbI (arXiv:1502.05698) with their last question, of the kind "story".

    Every story has people of its own, by invented names, so that many can be read without contradiction. Stories whose
    last question names nobody are left out: in which of them the milk is meant could not be said.

    Args:
        path: one of bAbI's files; tasks 1, 5, 6 to 9 and 11 to 14 ask about people.
        stories: so many, the first ones; None is all.
        choices: answers of a question: of all stories, people too, but nobody whom the question names.
        seed: of names and choices.

    Raises:
        UserError: a file that cannot be read, is none of bAbI's, or has no such story.
    """
    rng = random.Random(f"stories {seed}")
    names = words.people(rng)
    told = [story for story in _stories(path) if _split(story[1])][:stories]
    if not told:
        raise UserError(f"{path} has no story of bAbI whose last question names a person; give task 1, for one")
    cast = [_cast(f"{text} {question}", names) for text, question, _ in told]
    everybody = [name for people in cast for name in people.values()]
    answers = list(dict.fromkeys(answer for _, _, answer in told if answer not in BABI_PEOPLE))
    documents, asked = [], []
    for number, ((text, question, answer), people) in enumerate(zip(told, cast, strict=True), 1):
        title, prompt = f"story {number}", _renamed(question, people)
        documents.append(Document(title, _renamed(text, people)))
        others = [name for name in everybody if name not in prompt] if answer in people else answers
        found, gold = among(people.get(answer, answer), others, choices, rng)
        subject = people[_split(question)[0]]
        asked.append(KnowledgeQuestion("story", "story", subject, prompt, found, gold, (title,)))
    return Material(tuple(documents), tuple(asked))


def _cast(text: str, names: Iterator[tuple[str, str]]) -> dict[str, str]:
    """An invented name for everybody in a story, whom its she and he fit."""
    return {
        person: next(name for name, pronoun in names if pronoun == BABI_PEOPLE[person])
        for person in dict.fromkeys(_split(text))
    }


def _words_of(entries: str | Path, senses: str | Path) -> list[tuple[str, str]]:
    heads = {row["ID"]: row["Headword"].strip() for row in _rows(entries, ("ID", "Headword"))}
    found: dict[str, list[str]] = {}
    for row in _rows(senses, ("Entry_ID", "Description")):
        found.setdefault(row["Entry_ID"], []).append(row["Description"].strip())
    pairs = [(heads.get(entry, ""), own[0]) for entry, own in found.items() if len(own) == 1]
    pairs = [(head, meaning) for head, meaning in pairs if _WORD.fullmatch(head) and meaning and "[" not in meaning]
    counts = Counter(text for pair in pairs for text in pair)
    return [pair for pair in pairs if counts[pair[0]] == counts[pair[1]] == 1]


def _rows(path: str | Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := set(columns) - set(reader.fieldnames or ()):
                raise UserError(f"{path} has no column {sorted(missing)[0]}; give a dictionary's file in CLDF")
            return [{name: row[name] or "" for name in columns} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error})") from error


def _ends_in_names(text: str, names: set[str]) -> Iterator[tuple[str, str]]:
    """(beginning of a sentence, the first name that it has room before)."""
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _SENTENCE.split(" ".join(paragraph.split())):
            for match in _NAME.finditer(sentence):
                before = sentence[: match.start()].rstrip()
                if match[0] in names and len(before.split()) >= _FEWEST_WORDS and match[0] not in before:
                    yield before, match[0]
                    break


def _stories(path: str | Path) -> list[tuple[str, str, str]]:
    """(what is told before it, the last question, its answer) of every story."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error})") from error
    stories: list[tuple[list[str], list[str]]] = []
    last = len(lines)
    for number, line in enumerate(lines, 1):
        place, _, rest = line.partition(" ")
        if not place.isdigit():
            raise UserError(f"{path}, line {number}: no number at its beginning, so this is no file of bAbI")
        if int(place) <= last:
            stories.append(([], []))
        last = int(place)
        sentence, *answer = (part.strip() for part in rest.split("\t"))
        told, asked = stories[-1]
        if answer:
            asked[:] = " ".join(told), sentence, answer[0]
        else:
            told.append(sentence)
    return [(asked[0], asked[1], asked[2]) for _, asked in stories if asked]


def _split(text: str) -> list[str]:
    return [name for name in re.findall(r"\w+", text) if name in BABI_PEOPLE]


def _renamed(text: str, people: dict[str, str]) -> str:
    return re.sub(r"\w+", lambda match: people.get(match[0], match[0]), text)
