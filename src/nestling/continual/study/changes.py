"""What a later text tells otherwise than an earlier one: the later one is believed.

Studied side by side, both would be learned, and the answer that more exercises have would win. So the earlier text is
amended before exercises are made of it. A sentence says that something changed where it has words for that ("no longer
A, but B"), names whom the earlier passage is about, and repeats what that one says of them (A) beside something of the
same form (B). The earlier passage then says B. What is told later in other words is left beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nestling.continual.study.english import CHANGES
from nestling.continual.study.exercises import Gap, gaps, name_in, passages, sentences, standing, subject

_CHANGED = re.compile(CHANGES, re.IGNORECASE)
_FIRST = re.compile(r"(?:(an?|the) )?(\w)", re.IGNORECASE)
_LAST_WORD = re.compile(r"(\w+)\W*$")


def amended(texts: Sequence[str], names: frozenset[str] = frozenset()) -> list[list[str]]:
    """The passages of every text, with what later texts change in them.

    Args:
        texts: in the order in which they are to be believed, the last one most.
        names: known as names, see `subject`.

    Examples:
        >>> from nestling.continual.study.changes import amended
        >>> amended(["Vera Sorborg keeps an owl.", "Vera Sorborg no longer has an owl, but a toad."])[0]
        ['Vera Sorborg keeps a toad.']
    """
    told = [passages(text) for text in texts]
    about = [[subject(passage, names) for passage in own] for own in told]
    for number, own in enumerate(told):
        for passage, name in zip(own, about[number], strict=True):
            for said in sentences(passage) if name else ():
                if _CHANGED.search(said):
                    for earlier in range(number):
                        told[earlier] = [
                            _amended(each, str(name), name_in(said, str(name))) if of == name else each
                            for each, of in zip(told[earlier], about[earlier], strict=True)
                        ]
    return told


def _amended(passage: str, about: str, change: str) -> str:
    """A passage with what a sentence says that changed."""
    marks = [match.span() for match in _CHANGED.finditer(change)]
    new = [gap for gap in gaps(change, about) if not any(_overlap(gap, mark) for mark in marks)]
    for sentence in sentences(passage):
        named = name_in(sentence, about)
        pairs = [
            (old, each)
            for gap in gaps(named, about)
            if (old := _repeated(gap, change)) is not None
            for each in new
            if _core(each) not in named and _same_form(old, each)
        ]
        if pairs:
            old, best = max(pairs, key=_likeness)
            # Of the sentence as it stands, where its pronoun may be before what changed.
            passage = passage.replace(sentence, sentence.replace(old[1], best[1]))
    return passage


def _overlap(gap: Gap, span: tuple[int, int]) -> bool:
    return len(gap[0]) < span[1] and span[0] < len(gap[0]) + len(gap[1])


def _repeated(gap: Gap, change: str) -> Gap | None:
    """Of some words the last ones that a sentence repeats, once: of "makes bells" perhaps "bells"; None for none."""
    before, words, after = gap
    parts = words.split(" ")
    for start in range(len(parts)):
        last = " ".join(parts[start:])
        found = (" ".join([before, *parts[:start]]) if start else before, last, after)
        if len(standing(_core(found)).findall(change)) == 1:
            return found
    return None


def _likeness(pair: tuple[Gap, Gap]) -> tuple[bool, int]:
    """Whether the same word stands before the old and the new one, and how late the new one comes."""
    words = [match.group(1) if (match := _LAST_WORD.search(gap[0])) else "" for gap in pair]
    return words[0] == words[1], len(pair[1][0])


def _same_form(old: Gap, new: Gap) -> bool:
    """Both with an article or both without, both names or neither."""
    forms = [match.groups() if (match := _FIRST.match(gap[1])) else (None, "") for gap in (old, new)]
    kinds = [(article.lower()[0] if article else "", first.isupper()) for article, first in forms]
    return kinds[0] == kinds[1]


def _core(gap: Gap) -> str:
    """Without its article."""
    return re.sub(r"^(?:an?|the) ", "", gap[1], flags=re.IGNORECASE)
