"""Where a memory speaks."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from nestling.continual.store.scope import KNOWN, LATE, LEAST, LONGEST, MARGIN, SHORTEST, Scope, scope_from

SCOPE = Scope(
    forms=(((7, 8), 0), ((17, 8), 0), ((3,), 1), ((4,), 2), ((5, 5, 5), 3)),
    surprise=(12.0, 11.0, 13.0, 16.0),
    passages=((0, 1), (1, 2), (3,)),
    threshold=LEAST,
)


def by_definition(scope: Scope, ids: list[int]) -> int:
    """The first place up to which some passage has enough evidence, every beginning of the text read anew."""
    for place in range(len(ids)):
        common = math.log(max(SHORTEST, place + 1)) + MARGIN
        said = {
            word
            for tokens, word in scope.forms
            for end in range(len(tokens), place + 2)
            if tuple(ids[end - len(tokens) : end]) == tokens
            and scope.surprise[word] > math.log(max(SHORTEST, end)) + MARGIN
        }
        ends_here = {word for tokens, word in scope.forms if tuple(ids[place + 1 - len(tokens) : place + 1]) == tokens}
        for words in scope.passages:
            found = sum(max(0.0, scope.surprise[word] - common) for word in said & set(words))
            if ends_here & said & set(words) and found >= scope.threshold:
                return place
    return len(ids)


def test_it_opens_as_defined() -> None:
    rng = random.Random(0)
    found = []
    for _ in range(400):
        ids = [rng.choice([3, 4, 5, 7, 8, 17, *range(30, 30 + rng.choice([1, 60]))]) for _ in range(rng.randrange(60))]
        found.append(SCOPE.opens(ids))
        assert found[-1] == by_definition(SCOPE, ids)
        reached = [SCOPE.highest(ids[: place + 1]) for place in range(len(ids))]
        assert [each >= SCOPE.threshold for each in reached].count(False) == found[-1]
    assert {0 < each < 30 for each in found} == {False, True}


@pytest.mark.parametrize(
    "ids, place",
    [
        ([5, 5, 5], 2),  # one rare word
        ([9, 7, 8, 3], 3),  # two of a passage
        ([9, 7, 8, 4], 4),  # two of two passages
        ([17, 8, 9, 3], 3),  # another spelling
        ([7, 8, 7, 8, 17, 8], 6),  # one word again and again
        ([3, 3, 4], 2),
        ([9] * 200 + [5, 5, 5], 203),  # far inside a text it may be chance
        ([9] * 51 + [5, 5, 5], 53),  # 16 - log 54 - 3 is 9.01
        ([9] * 52 + [5, 5, 5], 55),
        ([9] * 200 + [3, 7, 8], 203),
        ([5, 5], 2),
        ([], 0),
    ],
)
def test_where_it_opens(ids: list[int], place: int) -> None:
    assert SCOPE.opens(ids) == place


def test_values_and_back() -> None:
    assert scope_from(json.loads(json.dumps(SCOPE.values()))) == SCOPE


@pytest.mark.parametrize(
    "wrong",
    [
        {"surprise": [1.0]},
        {"surprise": [1.0, 1.0, 1.0, math.inf]},
        {"threshold": math.nan},
        {"threshold": None},
        {"threshold": [9.0]},
        {"forms": [[[], 0]]},
        {"forms": [[[1] * (LONGEST + 1), 0]]},
        {"forms": [[["a"], 0]]},
        {"forms": [[[1], True]]},
        {"forms": 3},
        {"passages": [[-1]]},
        {"passages": [["0"]]},
    ],
)
def test_what_is_no_scope_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the memory's scope is none"):
        scope_from(SCOPE.values() | wrong)
    with pytest.raises(ValueError, match="the memory's scope is none"):
        scope_from(3)


def test_two_scopes_joined_open_where_either_does() -> None:
    other = Scope((((40,), 0), ((3,), 1), ((41, 42), 0)), (14.0, 10.5), ((0, 1), (0,)), 9.5)
    both = SCOPE.joined(other)
    assert len(both.surprise) == 5 and len(both.passages) == 5
    assert both.threshold == (9.0, 9.0, 9.0, 9.5, 9.5)
    assert scope_from(json.loads(json.dumps(both.values()))) == both
    assert both.surprise[1] == 10.5  # the commoner of two estimates of one word
    for ids in ([5, 5, 5, 1], [40, 3], [41, 42, 3], [3, 9, 40], [9, 9, 9]):
        assert both.opens(ids) <= max(min(SCOPE.opens(ids), other.opens(ids)), len(ids))
    assert both.opens([40, 3]) == both.opens([41, 42, 3]) - 1 == 1 and both.opens([4, 41, 42]) == 3
    assert SCOPE.joined(SCOPE) == SCOPE


def test_of_two_adapters_the_one_speaks_that_the_text_is_about() -> None:
    """1 is a name that both have, 2 and 3 are the names behind it."""

    def scope(*words: int) -> Scope:
        return Scope(
            tuple(((w,), i) for i, w in enumerate(words)), (16.0,) * len(words), (tuple(range(len(words))),), 9.0
        )

    vera_hale, vera_sorborg = scope(1, 2), scope(1, 3)
    text = [9, 1, 2, 9, 9]
    assert vera_hale.speaking(text, [vera_sorborg]) == [False, True, True, True, True]
    assert vera_sorborg.speaking(text, [vera_hale]) == [False, True, False, False, False]
    assert vera_sorborg.speaking(text) == [False, True, True, True, True]  # alone
    both = [1, 2, 9, 1, 3]
    assert vera_sorborg.speaking(both, [vera_hale]) == [True, False, False, False, True]
    assert vera_hale.speaking(both, [vera_sorborg]) == [True] * 5
    later = [1, 2] + [9] * LATE + [1, 3]
    assert vera_hale.speaking(later, [vera_sorborg])[-3:] == [True, True, False]
    assert vera_sorborg.speaking(later, [vera_hale])[-3:] == [False, True, True]
    assert vera_hale.speaking(text, [vera_hale]) == [False, True, True, True, True]  # the same words: both
    for ids in (text, both, later):
        for length in range(len(ids)):
            assert vera_sorborg.speaking(ids[:length], [vera_hale]) == vera_sorborg.speaking(ids, [vera_hale])[:length]
    many = scope(*range(100, 100 + KNOWN))
    for number in range(KNOWN + 2):
        assert many.opens([100, number]) == 0
    assert len(many._known) <= KNOWN


def test_what_speaks_beside_another() -> None:
    a, b = Scope((((1,), 0),), (16.0,), ((0,),), 9.0), Scope((((2,), 0),), (16.0,), ((0,),), 9.0)
    weak = Scope((((2,), 0),), (7.0,), ((0,),), 9.0)
    text = [1] + [9] * LATE + [2] + [9] * 5
    assert a.speaking(text, [weak]) == [True] * len(text)  # what is not spoken of silences nobody
    assert a.speaking(text, [b]) == [True] * (LATE + 1) + [False] * 6
    near = [1, 9, 2, 9]
    assert a.speaking(near, [b]) == [True] * 4 and b.speaking(near, [a]) == [False, False, True, True]


def test_joined_scopes_open_where_each_did() -> None:
    """A passage keeps its threshold; of one that both have the lower one counts."""
    high, low = Scope((((1,), 0),), (16.0,), ((0,),), 10.3), Scope((((2,), 0),), (16.0,), ((0,),), 9.0)
    both = high.joined(low)
    assert (both.opens([1]), both.opens([2])) == (1, 0) == (high.opens([1]), low.opens([2]))
    assert high.joined(replace(high, threshold=9.0)).opens([1]) == 0
