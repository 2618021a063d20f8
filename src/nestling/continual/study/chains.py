"""Exercises that put two passages together: what one says of a name that the other one has.

A model that knows that Vera lives in Askside, and what Askside is known for, does not therefore know what the place
where she lives is known for (the two-hop curse, arXiv:2411.16353): each fact is stored where its own words lead. What
follows from two passages is therefore studied too, without the name between them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from nestling.continual.study.exercises import Exercise, gaps, name_in, named_in, question, sentences, standing
from nestling.continual.study.kinds import Kinds, Passage

FEW = 3
"""Passages about a name at most: of what a whole book is about, too much follows."""
MOST = 6
"""Exercises of a passage."""


def chains(told: Sequence[Passage], kinds: Kinds) -> list[list[Exercise]]:
    """Of every passage, what follows from it and another one.

    Args:
        told: passages of all texts.
        kinds: of what they say, for what names something without saying it.

    Examples:
        >>> from nestling.continual.study.chains import chains
        >>> told = [("Vera Sorborg lives in Askside.", "Vera Sorborg"), ("Askside is known for bells.", "Askside")]
        >>> for each in chains(told, {"Askside": ["town"]})[0]:
        ...     print(" ".join(each.prompt.split()), each.answer)
        Question: Vera Sorborg lives in something; that is known for what? Answer: bells
        Question: The town of Vera Sorborg is known for what? Answer: bells
    """
    of: dict[str, list[str]] = defaultdict(list)
    for passage, about in told:
        if about is not None:
            of[about].append(passage)
    few = {name: own for name, own in of.items() if len(own) <= FEW}
    found = []
    for passage, about in told:
        made = dict.fromkeys(_from(passage, about, few, kinds) if about is not None else ())
        found.append(list(made)[:MOST])
    return found


def _from(passage: str, about: str, few: dict[str, list[str]], kinds: Kinds) -> Iterator[Exercise]:
    for said in sentences(passage):
        sentence = name_in(said, about)
        for name in (each for each in few if each != about and _stands(each, sentence)):
            first = _without(sentence.rstrip(".!?"), name, "something")
            for other in (name_in(each, name) for own in few[name] for each in sentences(own)):
                if not _stands(name, other) or _stands(about, other):
                    continue
                # The last words are mostly what a sentence is for.
                for before, words, after in gaps(other, name)[-1:]:
                    open_ = _small(before, name) + "what" + after
                    both = f"{first}; {_without(open_, name, 'that')}"
                    yield Exercise("chain", question(both), words, named_in(first, about))
                    for kind in kinds.get(name, ()):
                        one = _without(open_, name, f"the {kind} of {about}")
                        yield Exercise("chain", question(one[0].upper() + one[1:]), words, about)


def _stands(name: str, text: str) -> bool:
    return standing(name).search(text) is not None


def _without(text: str, name: str, word: str) -> str:
    return standing(name).sub(word, text)


def _small(text: str, name: str) -> str:
    """The beginning of a sentence that goes on."""
    return text if text.startswith(name) or not text else text[0].lower() + text[1:]
