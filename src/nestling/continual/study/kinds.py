"""Exercises that ask for something by its kind: "the bird of Vera" for the owl that she keeps.

A text says that Vera keeps an owl. Whoever asks for her animal uses a word that the text does not have, and an answer
that was learned behind the text's own words alone is not found behind that one. What kind of thing a phrase stands for
the base model knows; it is asked once, with examples before the phrase.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.scoring import Reader
from nestling.continual.stream.tokenizing import own_beginning, plain_tokens
from nestling.continual.study.english import COMMON, VAGUE
from nestling.continual.study.exercises import Exercise, asked, name_in, question, sentences

Kinds = Mapping[str, Sequence[str]]
"""Of phrases, the likeliest first; phrases of no kind are left out."""

EXAMPLES = """\
an old oak: tree
a hammer: tool
Paris: city
red: colour
Mary Brown: person
a teacher: profession
in 1815: year
salt: food
a violin: instrument
"""
FORMS = ("What is the {kind} of {name}?", "Which {kind} has to do with {name}?", "{name}, {kind}:")
LIKELY = 0.08
"""Probability of a kind at least."""
WHOLE = 0.3
"""Probability at least that nothing follows it: it is a word, and not the beginning of one."""
LETTERS = 3
"""A kind has so many letters, and other ones than the phrase's own words begin with."""
FIRST = round(1 / LIKELY)
"""So many are likely at most."""
ROWS = 16

Passage = tuple[str, str | None]
"""With whom it is about."""


def phrases(told: Sequence[Passage]) -> list[str]:
    """What of some passages may have a kind: of what their sentences say at their end, the last words, names, and what
    has an article. Each once."""
    found = (words for passage, about in told if about is not None for words in _said(passage, about))
    return list(dict.fromkeys(found))


def of_kinds(passage: str, about: str, kinds: Kinds) -> Iterator[Exercise]:
    """Exercises of one passage: what is of some kind, and whose it is. A kind that two phrases have asks for neither.

    Args:
        passage: of a text.
        about: its subject.
        kinds: of its phrases.

    Examples:
        >>> from nestling.continual.study.kinds import of_kinds
        >>> for each in of_kinds("Vera Sorborg keeps an owl.", "Vera Sorborg", {"an owl": ["bird"]}):
        ...     print(" ".join(each.prompt.split()), each.answer)
        Question: What is the bird of Vera Sorborg? Answer: an owl
        Question: Whose bird is an owl? Answer: Vera Sorborg
    """
    turn, said = 0, list(dict.fromkeys(_said(passage, about)))
    counts = Counter(kind for words in said for kind in kinds.get(words, ()))
    for words in said:
        for number, kind in enumerate(each for each in kinds.get(words, ()) if counts[each] == 1):
            form = FORMS[turn % len(FORMS)].format(kind=kind, name=about)
            turn += 1
            yield Exercise("kind", question(form) if form.endswith("?") else form, words, about)
            if not number:
                yield Exercise("kind", question(f"Whose {kind} is {words}"), about)


def ask_kinds(
    found: Sequence[str], reader: Reader, tokenizer: PreTrainedTokenizerBase, most: int, context: int
) -> Kinds:
    """The kinds of some phrases; none where the tokenizer has no line ends, or the examples are too long.

    Args:
        found: phrases.
        reader: of the model, with its base weights on.
        tokenizer: of that model.
        most: kinds of a phrase.
        context: tokens that are read together at most.
    """
    line = plain_tokens(tokenizer, "a")
    end = plain_tokens(tokenizer, "a\n")[len(line) :]  # alone it may get a space before it
    before = [*own_beginning(tokenizer), *plain_tokens(tokenizer, EXAMPLES)]
    prompts = [(phrase, [*before, *plain_tokens(tokenizer, f"{phrase}:")]) for phrase in found]
    prompts = [(phrase, ids) for phrase, ids in prompts if end and len(ids) + 2 <= context]
    kinds: dict[str, list[str]] = {}
    whole: dict[int, bool] = {}
    for place in range(0, len(prompts), ROWS):
        some = prompts[place : place + ROWS]
        said = _next(reader, [ids for _, ids in some], end)
        for (phrase, ids), chances in zip(some, said, strict=True):
            likely = [i for i in chances.topk(min(FIRST, len(chances))).indices.tolist() if chances[i] >= LIKELY]
            words = {i: _after(tokenizer, ids[-1], i) for i in likely}
            new = [i for i in likely if _is_kind(words[i], phrase)]
            if unknown := [i for i in new if i not in whole]:
                ends = _next(reader, [[*ids, i] for i in unknown], end)[:, end[0]]
                whole |= {i: bool(chance >= WHOLE) for i, chance in zip(unknown, ends, strict=True)}
            if own := [words[i].strip() for i in new if whole[i]][:most]:
                kinds[phrase] = own
    return kinds


def _said(passage: str, about: str) -> Iterator[str]:
    """See `phrases`."""
    for said in sentences(passage):
        found = asked(name_in(said, about), about)
        for place, (_, words, _) in enumerate(found):
            if place == len(found) - 1 or words[0].isupper() or words.split()[0].lower() in COMMON:
                yield words


def _after(tokenizer: PreTrainedTokenizerBase, token: int, new: int) -> str:
    """What a token adds to a text: some tokenizers leave out the space that a text begins with."""
    return str(tokenizer.decode([token, new])).removeprefix(str(tokenizer.decode([token])))


def _is_kind(word: str, phrase: str) -> bool:
    """Whether it is a word of its own that says something of the phrase."""
    plain = word.strip()
    said = plain[:LETTERS].lower() not in phrase.lower() and plain.lower() not in VAGUE
    return word.startswith(" ") and plain.isalpha() and len(plain) >= LETTERS and said


@torch.no_grad()
def _next(reader: Reader, prompts: Sequence[Sequence[int]], filler: Sequence[int]) -> Tensor:
    """Probabilities of what comes after each prompt."""
    one = torch.ones(1, dtype=torch.bool)
    pieces = [Piece(torch.tensor([*ids, filler[0]]), len(ids), one) for ids in prompts]
    return reader.logits(pieces).softmax(-1).cpu()
