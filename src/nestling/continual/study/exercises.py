"""Exercises made of a text itself: its passages, their sentences, and questions about the words in them.

A model that reads a text in its own order learns to say it in that order. Exercises bring the same facts another way
round: every sentence says whom it is about, its words are asked for one by one, and the words lead back to the name.
Only the text is used: no other model writes here, and no question that somebody may ask later is known.

What is known of the language is little: where sentences end, the English pronouns that begin one, common words. In a
text of another language the passages and the gaps remain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nestling.continual.study.english import COMMON, POSSESSIVES, PRONOUNS, TITLES, TO_BE

Kind = Literal["passage", "sentence", "gap", "name", "index", "kind", "chain"]
Gap = tuple[str, str, str]
"""What stands before some words, the words, and what stands after them."""
LONGEST = 1200  # characters of a passage, some 300 tokens: what is read in one go and asked for as a whole
MOST_WORDS = 6  # of what is asked for
LAST = 2  # of what a sentence says, that much or half of it is asked for

_PARAGRAPH = re.compile(r"\n\s*\n")
_END = re.compile(r"([.!?][\"”’')\]]*)\s+(?=[^\w\s]*(\w))")
_WORD = re.compile(r"[^\W_](?:[\w’'-]*[^\W_])?")
_NAME = re.compile(r"[A-Z][\w-]*[^\W_](?: (?:of |de |van |von )?[A-Z][\w-]*[^\W_])*")


@dataclass(frozen=True)
class Exercise:
    """What is read, and what of it is to be said.

    Attributes:
        kind: "passage" and "sentence" are read as they are; "gap" asks for words of a sentence, "name" for the one it
            is about, "index" leads from words to that name, "kind" asks for something by its kind, "chain" for words of
            another passage.
        prompt: is read and not learned; "" for what is read as it is.
        answer: is learned.
        about: the name in what is read, where that is what the rest hangs on; None in the other kinds.
    """

    kind: Kind
    prompt: str
    answer: str
    about: str | None = None


def exercises(text: str) -> list[Exercise]:
    """All exercises of a text, in its order, each once.

    Args:
        text: of any length and language; the kinds "name" and "index" take names in capitals, as English has them.

    Examples:
        >>> from nestling.continual.study.exercises import exercises
        >>> for each in exercises("Vera Sorborg lives here. She keeps an owl.")[-5:]:
        ...     print(each.kind, "|", " ".join(each.prompt.split()), "|", each.answer)
        sentence |  | Vera Sorborg keeps an owl.
        gap | Question: Vera Sorborg what an owl? Answer: | keeps
        gap | Question: Vera Sorborg keeps what? Answer: | an owl
        name | Question: Who keeps an owl? Answer: | Vera Sorborg
        index | an owl: | Vera Sorborg
    """
    return list(dict.fromkeys(each for passage in passages(text) for each in of_passage(passage, subject(passage))))


def of_passage(passage: str, about: str | None) -> Iterator[Exercise]:
    """Those of one passage, itself first.

    Args:
        passage: of a text.
        about: its subject.
    """
    yield Exercise("passage", "", passage, about)
    for said in sentences(passage):
        sentence = said if about is None else name_in(said, about)
        if sentence != passage:
            yield Exercise("sentence", "", sentence, named_in(sentence, about))
        found = asked(sentence, about)
        for before, words, after in found:
            yield Exercise("gap", question(before + "what" + after), words, named_in(before + after, about))
        if about is not None and about in sentence and found:
            yield Exercise("name", _asked_for(sentence, about), about)
            yield Exercise("index", f"{found[-1][1]}:", about)


def asked(sentence: str, about: str | None) -> list[Gap]:
    """What of a sentence is asked for: the last half of its gaps, or `LAST` of them. A sentence says what is new at its
    end, and asking for all of it takes time from that."""
    found = gaps(sentence, about)
    return found[-max(LAST, math.ceil(len(found) / 2)) :]


def passages(text: str) -> list[str]:
    """A text in paragraphs; one that is too long in runs of whole sentences, and a sentence that is too long in words.

    Lines that are broken inside a paragraph are joined.
    """
    found: list[str] = []
    for paragraph in _PARAGRAPH.split(text):
        joined = " ".join(paragraph.split())
        if joined:
            found.extend(_in_runs(joined))
    return found


def sentences(passage: str) -> list[str]:
    """The sentences of a passage. Neither a title's point ("Mr. Hale") ends one nor what goes on in a small letter."""
    found, begin = [], 0
    for match in _END.finditer(passage):
        said = passage[begin : match.end(1)]
        if not match.group(2).islower() and said.rsplit(" ", 1)[-1] not in TITLES:
            found.append(said)
            begin = match.end()
    return [each for each in (*found, passage[begin:]) if each]


def subject(passage: str, names: frozenset[str] = frozenset()) -> str | None:
    """The name that a passage is about: the one it begins with, or else the first of its names with two words or more,
    or else the first that stands inside a sentence or comes twice.

    Args:
        passage: of a text.
        names: single words that are known as names, from other places. A passage that begins with another single word
            begins with a name if "is", "has" or the like follows.
    """
    first = _NAME.match(passage)
    name = _plain(first.group()) if first else ""
    if first and name and name == first.group().removesuffix("'s") and name.lower() not in COMMON:
        after = _WORD.search(passage, first.end())
        if " " in name or name in names or (after is not None and after.group() in TO_BE):
            return name
    said = [(match.group(), match.start()) for match in _NAME.finditer(passage)]
    starts = {passage.index(sentence) for sentence in sentences(passage)}
    plain = [(_plain(each), start in starts) for each, start in said]
    plain = [(each, begins) for each, begins in plain if each and each.lower() not in COMMON]
    long = next((each for each, _ in plain if " " in each), None)
    counts = [each for each, _ in plain]
    return long or next((each for each, begins in plain if not begins or counts.count(each) > 1), None)


def names_in(texts: Iterable[str]) -> frozenset[str]:
    """What stands in capitals inside a sentence, in any of some texts."""
    found: set[str] = set()
    for sentence in (each for text in texts for passage in passages(text) for each in sentences(passage)):
        found.update(_plain(match.group()) for match in _NAME.finditer(sentence) if match.start())
    return frozenset(found) - {""}


def standing(words: str) -> re.Pattern[str]:
    """Finds words where they stand whole in a text."""
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)")


def named_in(text: str, name: str | None) -> str | None:
    """The name, where the text has it."""
    return name if name is not None and name in text else None


def name_in(sentence: str, name: str) -> str:
    """The sentence with the name in place of the pronoun that it begins with, or of the first in it."""
    if name in sentence:
        return sentence
    for match in _WORD.finditer(sentence):
        word = match.group().lower()
        if word in PRONOUNS or word in POSSESSIVES:
            new = name if word in PRONOUNS else name + "'s"
            return sentence[: match.start()] + new + sentence[match.end() :]
    return sentence


def gaps(sentence: str, about: str | None) -> list[Gap]:
    """Every run of words that say something, with its article, and what stands before and after it. Names of whom it is
    about, and words that most sentences have, are not asked for."""
    hidden = set() if about is None else {*about.split(), *(f"{word}'s" for word in about.split())}
    runs: list[list[re.Match[str]]] = [[]]
    words = list(_WORD.finditer(sentence))
    for place, match in enumerate(words):
        own = match.group() in hidden and not _of_another(words, place, hidden, sentence)
        says = not own and match.group().lower() not in COMMON
        joined = bool(runs[-1]) and not sentence[words[place - 1].end() : match.start()].strip()
        joined = joined and not (match.group()[0].isupper() and words[place - 1].group()[0].islower())
        if not says or not joined or len(runs[-1]) == MOST_WORDS:
            runs.append([])
        if says:
            runs[-1].append(match)
    found: list[Gap] = []
    for run in filter(None, runs):
        begin, end = _with_article(words, run[0]), run[-1].end()
        found.append((sentence[:begin], sentence[begin:end], sentence[end:]))
    return found


def _of_another(words: Sequence[re.Match[str]], place: int, hidden: set[str], sentence: str) -> bool:
    """Whether a word of the name is part of another one, as "Nadia" of "Nadia Lanshaw" where Nadia Hill is told of."""
    match = words[place]
    after = words[place + 1] if place + 1 < len(words) else None
    before = words[place - 1] if place > 1 else None
    beside = [(match, after)] if after is not None else []
    beside += [(before, match)] if before is not None else []
    others = [
        other
        for pair in beside
        for other in pair
        if other is not match and sentence[pair[0].end() : pair[1].start()] == " "
    ]
    return any(o.group()[0].isupper() and o.group() not in hidden and o.group().lower() not in COMMON for o in others)


def _with_article(words: Sequence[re.Match[str]], first: re.Match[str]) -> int:
    place = words.index(first)
    before = words[place - 1] if place else None
    return before.start() if before is not None and before.group().lower() in ("a", "an", "the") else first.start()


def question(text: str) -> str:
    """A text as it is asked."""
    return f"Question: {text.strip().rstrip('.!?')}?\nAnswer:"


def _asked_for(sentence: str, name: str) -> str:
    place = sentence.index(name)
    after = sentence[place + len(name) :]
    whose = after.startswith(("'s", "’s"))
    asked = ("whose" if whose else "who" if place == 0 else "whom") + (after[2:] if whose else after)
    asked = sentence[:place] + asked
    return question(asked[0].upper() + asked[1:])


def _plain(name: str) -> str:
    """Without "'s", and without a common word that a sentence begins with."""
    words = name.split()
    while words and words[0].lower() in COMMON:
        words = words[1:]
    return re.sub(r"[’']s$", "", " ".join(words))


def _in_runs(paragraph: str) -> Iterator[str]:
    run = ""
    for sentence in sentences(paragraph):
        for part in _in_words(sentence):
            if run and len(run) + len(part) >= LONGEST:
                yield run
                run = ""
            run = f"{run} {part}".strip()
    if run:
        yield run


def _in_words(sentence: str) -> Iterator[str]:
    part = ""
    for word in sentence.split(" "):
        if part and len(part) + len(word) >= LONGEST:
            yield part
            part = ""
        part = f"{part} {word}".strip()[:LONGEST]
    yield part
