"""The scope of what is studied: its words, and how rare each is in general."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestling.continual.store.scope import LEAST, LONGEST, MARGIN, SHORTEST, Form, Scope
from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.scoring import Reader
from nestling.continual.stream.tokenizing import own_beginning, plain_tokens

ROWS = 8
"""Pieces that are read together."""
OPEN = 32
"""Of so many pieces of the model's own text one at most may open the scope."""
MOST = 16.0
"""Nats: of rarer words (1e-7) no model knows how rare they are."""
COMMON = MARGIN + torch.tensor(float(SHORTEST)).log().item()
"""Nats: words of less surprise never count."""

_WORD = re.compile(r"\w+")


def make_scope(
    passages: Sequence[str], reader: Reader, tokenizer: PreTrainedTokenizerBase, own: Int[Tensor, "pieces length"]
) -> Scope:
    """That of some passages.

    How often a word begins is the mean of what the model expects at every place of its own text, which says more of a
    rare word than counting it there would; how often it goes on so is what the model expects after its beginning. A
    word counts in the letters it has, and with a small or a capital first letter.

    Args:
        passages: what is studied.
        reader: of the model, with its base weights on.
        tokenizer: of that model.
        own: text of the model's own. The threshold is at least `LEAST`, and so high that one in `OPEN` of these pieces
            reaches it at most.
    """
    words = sorted({word for passage in passages for word in _WORD.findall(passage)})
    spelled = {word: _spellings(word, tokenizer) for word in words}
    rare = _surprises(spelled, reader, tokenizer, own)
    number = {word: place for place, word in enumerate(sorted({w.lower() for w in words if rare[w] > COMMON}))}
    surprise = [MOST] * len(number)
    forms: dict[Form, None] = {}
    for word in words:
        place = number.get(word.lower())
        if place is None or rare[word] <= COMMON:
            continue
        surprise[place] = min(surprise[place], rare[word])
        forms |= dict.fromkeys((tokens, place) for tokens in spelled[word] if len(tokens) <= LONGEST)
    known = [sorted({number[w] for w in map(str.lower, _WORD.findall(p)) if w in number}) for p in passages]
    told = tuple(dict.fromkeys(tuple(each) for each in known if each))
    scope = Scope(_one_word_each(forms), tuple(surprise), told, LEAST)
    return replace(scope, threshold=_threshold(scope, own))


def _one_word_each(forms: Mapping[Form, None]) -> tuple[Form, ...]:
    """Tokens that two words could be written with are the first's."""
    found: dict[tuple[int, ...], int] = {}
    for tokens, word in forms:
        found.setdefault(tokens, word)
    return tuple(found.items())


def _threshold(scope: Scope, own: Int[Tensor, "pieces length"]) -> float:
    reached = sorted((scope.highest(row) for row in own.tolist()), reverse=True)
    most = len(reached) // OPEN
    return max(LEAST, torch.nextafter(torch.tensor(reached[most]), torch.tensor(torch.inf)).item())


def _spellings(word: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Ways to write it, inside a text first."""
    written = dict.fromkeys((word, word.lower(), word[0].upper() + word[1:]))
    tokens = [tuple(plain_tokens(tokenizer, before + each)) for before in (" ", "") for each in written]
    return [each for each in dict.fromkeys(tokens) if each]


@torch.no_grad()
def _surprises(
    spelled: Mapping[str, Sequence[tuple[int, ...]]],
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    own: Int[Tensor, "pieces length"],
) -> dict[str, float]:
    """-log of how often each word stands in general text, in its commonest spelling."""
    first = -_begins(reader, own).log()
    beginning = own_beginning(tokenizer)
    long = {tokens for ways in spelled.values() for tokens in ways if 1 < len(tokens) <= LONGEST}
    rest = _go_on(reader, sorted(long), beginning)
    return {
        word: min([MOST, *(float(first[tokens[0]]) + rest.get(tokens, 0.0) for tokens in ways)])
        for word, ways in spelled.items()
    }


def _begins(reader: Reader, own: Int[Tensor, "pieces length"]) -> Float[Tensor, " vocabulary"]:
    """Mean probability of every token over all places of a text."""
    total, places = torch.zeros(()), 0
    for rows in own.split(ROWS):
        said = reader.logits([Piece(row, 0, torch.ones(len(row), dtype=torch.bool)) for row in rows])
        total, places = total + said.softmax(-1).sum(0).cpu(), places + len(said)
    return total / places


def _go_on(reader: Reader, words: Sequence[tuple[int, ...]], beginning: Sequence[int]) -> dict[tuple[int, ...], float]:
    """-log of the probability of every token of a word but the first, summed."""
    found: dict[tuple[int, ...], float] = {}
    for place in range(0, len(words), ROWS * ROWS):
        some = words[place : place + ROWS * ROWS]
        start = len(beginning) + 1
        pieces = [
            Piece(torch.tensor([*beginning, *each]), start, torch.ones(len(each) - 1, dtype=torch.bool))
            for each in some
        ]
        losses = reader.scores(pieces).cpu().split([len(each) - 1 for each in some])
        found |= {each: float(own.sum()) for each, own in zip(some, losses, strict=True)}
    return found
