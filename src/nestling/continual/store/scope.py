"""Where a memory speaks: from the place on where a text has named something that the memory was taught.

A memory that is on everywhere changes the model everywhere. A scope (as of SERAC, arXiv:2206.06520, and GRACE,
arXiv:2211.11031) keeps it silent in all other text, where the model is then the base model to the last bit. It is a
test of one hypothesis a passage, that a text is about it, against the other that its words came together by chance:

    evidence of a passage after n tokens = sum over its words read so far of max(0, surprise - log n - MARGIN)

where a word's surprise is -log of how often it stands in general text. The chance of meeting a word among n is at most
n times that, so a rare word of a passage says much at the beginning of a text and less far inside it, and common words
say nothing. Once the evidence of a passage has reached the threshold the memory speaks to the end of the text.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any

SHORTEST = 16
"""n is at least that: two words that often go together are no news in a text of two words."""
MARGIN = 3.0
"""Nats: words are twenty times likelier in some texts than in general."""
LEAST = 9.0
"""Nats, the least threshold. Two rare words (1e-6 of all words) give 10 at the beginning of a text."""
LONGEST = 32
"""Tokens of a word at most."""

LATE = 32
"""Tokens: what was read of late, where two adapters have words in common."""
KNOWN = 256
"""Texts whose words are remembered: several scopes look at one text."""

Form = tuple[tuple[int, ...], int]
"""Tokens that a word is written with, and which word it is."""
Span = tuple[int, int]
"""Place of a word's last token, and how many it has."""
Mention = tuple[int, int, int]
"""The same, and which word it is."""


@dataclass(frozen=True)
class Scope:
    """The words of what a memory was taught, by passage.

    Attributes:
        forms: ways to write a word, each with the number of the word.
        surprise: of every word, nats.
        passages: numbers of the words that stand in each.
        threshold: evidence from which on the memory speaks, nats; of all passages, or of each.

    Raises:
        ValueError: numbers that name no word, a word without tokens, or values that are not finite.

    Examples:
        >>> from nestling.continual.store.scope import Scope
        >>> scope = Scope(forms=(((7, 8), 0),), surprise=(16.0,), passages=((0,),), threshold=9.0)
        >>> scope.opens([1, 2, 7, 8, 3])  # 16 - log 16 - 3 = 10.2 at the word's last token
        3
    """

    forms: tuple[Form, ...]
    surprise: tuple[float, ...]
    passages: tuple[tuple[int, ...], ...]
    threshold: float | tuple[float, ...]
    _words: dict[tuple[int, ...], int] = field(init=False, repr=False, compare=False)
    _where: list[list[int]] = field(init=False, repr=False, compare=False)
    _known: dict[tuple[int, ...], list[Mention]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises ValueError where it does not fit together."""
        count = len(self.surprise)
        named = chain((word for _, word in self.forms), chain.from_iterable(self.passages))
        if not all(0 <= word < count for word in named):
            raise ValueError(f"a scope names a word that is none of its {count}")
        if not all(0 < len(tokens) <= LONGEST for tokens, _ in self.forms):
            raise ValueError(f"a word of a scope has 1 to {LONGEST} tokens")
        if len(self._needed) != len(self.passages):
            raise ValueError(f"a scope of {len(self.passages)} passages has {len(self._needed)} thresholds")
        if not all(map(math.isfinite, (*self.surprise, *self._needed))):
            raise ValueError("a surprise or the threshold of a scope is not finite")
        where: list[list[int]] = [[] for _ in self.surprise]
        for passage, words in enumerate(self.passages):
            for word in words:
                where[word].append(passage)
        object.__setattr__(self, "_words", dict(self.forms))
        object.__setattr__(self, "_where", where)
        object.__setattr__(self, "_known", {})

    @property
    def _needed(self) -> tuple[float, ...]:
        """The threshold of every passage."""
        own = self.threshold
        return own if isinstance(own, tuple) else (own,) * len(self.passages)

    def opens(self, ids: Sequence[int]) -> int:
        """The place of the first token at which the memory speaks; their number where it is silent."""
        return next((place for place, found in self._reached(ids) if found), len(ids))

    def speaking(self, ids: Sequence[int], others: Sequence[Scope] = ()) -> list[bool]:
        """At which tokens the memory speaks: from `opens` to the end, where it is alone.

        Args:
            ids: tokens.
            others: scopes of other adapters beside it. As long as the text is about a passage of theirs that has all
                words of late that a passage here has, and more, it is not about this one: Vera Hale is no reason to
                speak of Vera Sorborg, nor is what was said of her long before.
        """
        if not others:
            first = self.opens(ids)
            return [place >= first for place in range(len(ids))]
        new = [dict(scope._reached(ids)) for scope in (self, *others)]
        events = {place for scope in (self, *others) for place, _, _ in scope._mentions(ids)}
        reached: list[set[int]] = [set() for _ in new]
        found, speaks = [], False
        for place in range(len(ids)):
            for known, own in zip(reached, new, strict=True):
                known.update(own.get(place, ()))
            if place in events and reached[0]:
                late = [scope._late(ids, place) for scope in (self, *others)]
                pairs = list(zip(reached[1:], late[1:], strict=True))
                theirs = [spans[p] for known, spans in pairs for p in known if p in spans]
                speaks = any(not any(late[0].get(p, set()) < each for each in theirs) for p in reached[0])
            found.append(speaks)
        return found

    def highest(self, ids: Sequence[int]) -> float:
        """The most evidence there is of any passage at any of these tokens, nats; 0 where there is none."""
        return max((max(found.values()) for _, found in self._evidence(ids)), default=0.0)

    def joined(self, other: Scope) -> Scope:
        """Of what both were taught. Words that both have are one: the commoner estimate counts, and of a passage that
        both have the lower threshold."""
        number, words, surprise = self._renumbered(other)
        theirs = (tuple(number[w] for w in own) for own in other.passages)
        needed: dict[tuple[int, ...], float] = {}
        for passage, nats in zip(chain(self.passages, theirs), self._needed + other._needed, strict=True):
            needed[passage] = min(nats, needed.get(passage, math.inf))
        values = tuple(needed.values())
        threshold = values[0] if len(set(values)) == 1 else values
        return Scope(tuple(words.items()), tuple(surprise), tuple(needed), threshold)

    def _renumbered(self, other: Scope) -> tuple[dict[int, int], dict[tuple[int, ...], int], list[float]]:
        """Numbers of the other's words here, all forms, and all surprises."""
        words, surprise = dict(self.forms), list(self.surprise)
        number: dict[int, int] = {}
        for tokens, word in other.forms:
            if tokens in words:
                number.setdefault(word, words[tokens])
        for word, value in enumerate(other.surprise):
            own = number.setdefault(word, len(surprise))
            if own == len(surprise):
                surprise.append(value)
            surprise[own] = min(surprise[own], value)
        for tokens, word in other.forms:
            words.setdefault(tokens, number[word])
        return number, words, surprise

    def _evidence(self, ids: Sequence[int]) -> Iterator[tuple[int, dict[int, float]]]:
        """Wherever a word ends, its place and the evidence of every passage that it stands in."""
        read: dict[int, set[int]] = {}
        for place, _, word in self._mentions(ids):
            common = _common(place)
            found = {}
            for passage in self._where[word]:
                words = read.setdefault(passage, set())
                words.add(word)
                found[passage] = sum(max(0.0, self.surprise[each] - common) for each in words)
            if found:
                yield place, found

    def _reached(self, ids: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Wherever a word ends, its place and the passages with enough evidence there."""
        needed = self._needed
        for place, found in self._evidence(ids):
            yield place, [passage for passage, nats in found.items() if nats >= needed[passage]]

    def _mentions(self, ids: Sequence[int]) -> list[Mention]:
        """All words that are rare where they stand, in the order in which they end."""
        key = tuple(ids)
        if key not in self._known:
            if len(self._known) == KNOWN:
                self._known.clear()
            self._known[key] = list(self._found(key))
        return self._known[key]

    def _found(self, ids: tuple[int, ...]) -> Iterator[Mention]:
        longest = max((len(tokens) for tokens in self._words), default=0)
        for place in range(len(ids)):
            for length in range(1, min(longest, place + 1) + 1):
                word = self._words.get(ids[place + 1 - length : place + 1])
                if word is not None and self.surprise[word] > _common(place):
                    yield place, length, word

    def _late(self, ids: Sequence[int], place: int) -> dict[int, set[Span]]:
        """Which words of every passage were read of late, up to a place: where they stand."""
        spans: dict[int, set[Span]] = {}
        mentions = self._mentions(ids)
        first = bisect_right(mentions, place - LATE, key=itemgetter(0))
        for end, length, word in mentions[first : bisect_right(mentions, place, key=itemgetter(0))]:
            for passage in self._where[word]:
                spans.setdefault(passage, set()).add((end, length))
        return spans

    def values(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "forms": [[list(tokens), word] for tokens, word in self.forms],
            "surprise": list(self.surprise),
            "passages": [list(words) for words in self.passages],
            "threshold": list(self.threshold) if isinstance(self.threshold, tuple) else self.threshold,
        }


def scope_from(values: Any) -> Scope:
    """The scope whose `values` these are, checked.

    Raises:
        ValueError: they are of no scope.
    """
    try:
        threshold = values["threshold"]
        return Scope(
            forms=tuple((tuple(_whole(t) for t in tokens), _whole(word)) for tokens, word in values["forms"]),
            surprise=tuple(float(each) for each in values["surprise"]),
            passages=tuple(tuple(_whole(word) for word in words) for words in values["passages"]),
            threshold=tuple(map(float, threshold)) if isinstance(threshold, list) else float(threshold),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the memory's scope is none: {error}") from error


def _common(place: int) -> float:
    """Surprise up to which a word says nothing at a place."""
    return math.log(max(SHORTEST, place + 1)) + MARGIN


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{str(value)[:40]} is no whole number")
    return value
