"""A stream of tokens cut into what is read together: chunks of pieces, each with its own context."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Part of a document, and what of the document it is read with.

    Attributes:
        ids: `[start + n]`, the context and the piece's own n tokens.
        start: tokens of context. 0 is a document's first piece: its first token is nobody's target.
        scored: `[n]`, which tokens are targets, where they can be.
    """

    ids: Int[Tensor, " start_n"]
    start: int
    scored: Bool[Tensor, " n"]

    def __len__(self) -> int:
        """Its own tokens."""
        return len(self.ids) - self.start

    @property
    def targets(self) -> Bool[Tensor, " n"]:
        """Which of its tokens have a loss."""
        return self.scored & (torch.arange(len(self)) + self.start > 0)

    def with_tokens(self, ids: Tensor, scored: Tensor) -> Piece:
        """The piece going on."""
        return Piece(torch.cat([self.ids, ids]), self.start, torch.cat([self.scored, scored]))

    def encode(self) -> Int[Tensor, " start_n"]:
        """One tensor of ids, those that are no targets as -1 - id; with `start` that is all of the piece."""
        marked = torch.cat([torch.zeros(self.start, dtype=torch.bool), self.scored])
        return torch.where(marked, self.ids, ~self.ids)


def decode(encoded: Int[Tensor, " start_n"], start: int) -> Piece:
    """The piece that `encode` gave."""
    return Piece(torch.where(encoded < 0, ~encoded, encoded), start, encoded[start:] >= 0)


class Stream:
    """The present chunk's pieces and the document's last tokens.

    A piece ends with its document, with the chunk, or when it has `size` tokens. Pieces that begin inside a chunk
    begin a document or follow a full piece, so where a piece begins, and with which context, does not depend on what
    comes later nor on how the tokens arrive.

    Args:
        chunk: tokens of a chunk.
        size: tokens of a piece at most.
        context: tokens that a piece is read with at most, its own included; more than a piece has, since its first
            token needs one to follow.

    Raises:
        ValueError: a context that has no room for a piece and one token before it.
    """

    def __init__(self, chunk: int, size: int, context: int) -> None:
        self.chunk, self.size, self.context = chunk, min(size, chunk), context
        if self.size >= context:
            raise ValueError(
                f"pieces of {self.size} tokens do not fit a context of {context}: each needs one token before it"
            )
        self.pieces: list[Piece] = []
        self.history = torch.empty(0, dtype=torch.int64)
        self.open = False

    @property
    def filled(self) -> int:
        """Tokens of the present chunk so far."""
        return sum(len(piece) for piece in self.pieces)

    @property
    def room(self) -> int:
        """Tokens that the chunk still takes."""
        return self.chunk - self.filled

    def add(self, ids: Int[Tensor, " n"], scored: Bool[Tensor, " n"]) -> None:
        """Put tokens of the present document in the chunk, which must have room for them."""
        while len(ids):
            if self.open and len(self.pieces[-1]) < self.size:
                take = min(len(ids), self.size - len(self.pieces[-1]))
                self.pieces[-1] = self.pieces[-1].with_tokens(ids[:take], scored[:take])
            else:
                take = min(len(ids), self.size)
                self.pieces.append(Piece(torch.cat([self.history, ids[:take]]), len(self.history), scored[:take]))
                self.open = True
            self.history = torch.cat([self.history, ids[:take]])[-(self.context - self.size) :]
            ids, scored = ids[take:], scored[take:]

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Where the block fails, the stream is as it was before it."""
        before = list(self.pieces), self.history, self.open
        try:
            yield
        except BaseException:
            self.pieces, self.history, self.open = before
            raise

    def end_document(self) -> None:
        """What comes next has nothing before it."""
        self.history, self.open = self.history[:0], False

    def end_chunk(self) -> None:
        """Begin an empty chunk in the same document."""
        self.pieces, self.open = [], False

    def last(self, tokens: int) -> list[Piece]:
        """The pieces that hold the chunk's last `tokens` tokens, in order, with no other tokens scored."""
        found: list[Piece] = []
        for piece in reversed(self.pieces):
            if tokens <= 0:
                break
            late = torch.arange(len(piece)) >= len(piece) - tokens
            found.append(Piece(piece.ids, piece.start, piece.scored & late))
            tokens -= len(piece)
        return found[::-1]


def batches(pieces: Sequence[Piece], budget: int) -> list[list[Piece]]:
    """Pieces in order, as many together as `budget` tokens hold with padding, at least one; those without targets left
    out."""
    found: list[list[Piece]] = []
    longest = 0
    for piece in pieces:
        if not bool(piece.targets.any()):
            continue
        longest = max(longest, len(piece.ids))
        if found and longest * (len(found[-1]) + 1) <= budget:
            found[-1].append(piece)
        else:
            found.append([piece])
            longest = len(piece.ids)
    return found


def placed(pieces: Sequence[Piece], losses: Float[Tensor, " targets"]) -> Float[Tensor, " tokens"]:
    """Losses of the pieces' targets at their tokens, float32, NaN elsewhere."""
    targets = torch.cat([piece.targets for piece in pieces])
    found = torch.full((len(targets),), math.nan, dtype=torch.float32)
    found[targets] = losses.float()
    return found


def check_tokens(
    tokens: Tensor | Sequence[int], scored: Tensor | Sequence[bool] | None, vocabulary: int
) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """Tokens and which of them are targets, as tensors on the CPU.

    Raises:
        ValueError: tokens that are no whole numbers or not in the vocabulary, or `scored` of another length.
    """
    try:
        ids = torch.as_tensor(tokens).cpu()
        ids = ids.clone() if ids.is_inference() else ids  # which no backward pass could keep
        given = None if scored is None else torch.as_tensor(scored).cpu().bool()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"tokens and scored are tensors or sequences, of shape [n] ({error})") from error
    if not ids.numel():
        ids = torch.empty(0, dtype=torch.int64)
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"tokens are whole numbers of shape [n], not {ids.dtype} of shape {tuple(ids.shape)}")
    ids = ids.long()
    outside = ((ids < 0) | (ids >= vocabulary)).nonzero()
    if len(outside):
        place = int(outside[0])
        raise ValueError(f"token {int(ids[place])} at {place} is not in the vocabulary of {vocabulary}")
    targets = torch.ones(len(ids), dtype=torch.bool) if given is None else given
    if targets.shape != ids.shape:
        raise ValueError(f"scored has shape {tuple(targets.shape)}, tokens {tuple(ids.shape)}")
    return ids, targets
