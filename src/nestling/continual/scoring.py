"""Scores of a chunk that is not full yet, without reading again what has been read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nestling.continual.pieces import Piece, batches, placed
from nestling.continual.reading import Reader, target_ids

Weights = list[tuple[int, int]]


@dataclass(frozen=True)
class ReadSoFar:
    """A model after the tokens of a piece that goes on.

    Attributes:
        ids: `[n]`, the tokens.
        cache: what the model keeps of them, as `past_key_values`.
        last: `[1, vocab]`, its logits after the last of them.
        weights: places and versions of the parameters it was read with.
    """

    ids: Int[Tensor, " n"]
    cache: Any
    last: Float[Tensor, "1 vocab"]
    weights: Weights


class Scorer:
    """Scores the tokens that a call brings; the piece they belong to goes on with the next call.

    The cache of the last piece is kept, so that a call costs its own tokens. It is used only while the piece goes on
    from the very tokens and with the very weights it was read with; a model that takes or gives none is read anew.

    Args:
        reader: of the model.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.kept: ReadSoFar | None = None

    def forget(self) -> None:
        """Drop the cache."""
        self.kept = None

    @torch.no_grad()
    def scores(self, held: Sequence[tuple[Piece, int]], budget: int) -> Float[Tensor, " tokens"]:
        """Losses of the last tokens of pieces, NaN where a token is no target.

        Args:
            held: pieces in order, the one that goes on last, each with how many of its last tokens are new.
            budget: tokens of a batch.
        """
        wanted = []
        for piece, own in held:
            late = torch.arange(len(piece)) >= len(piece) - own
            wanted.append(Piece(piece.ids, piece.start, piece.scored & late))
        found = [self.reader.scores(batch).cpu().float() for batch in batches(wanted[:-1], budget)]
        if bool(wanted[-1].targets.any()):
            read = self._continued(wanted[-1]) if self.reader.remembers else self.reader.scores(wanted[-1:])
            found.append(read.cpu().float())
        losses = placed(wanted, torch.cat(found) if found else torch.empty(0))
        return losses[-sum(own for _, own in held) :]

    def _continued(self, piece: Piece) -> Float[Tensor, " targets"]:
        """Losses of a piece's targets, read on from where an earlier call stopped if it can be."""
        weights = [(p.data_ptr(), p._version) for p in self.reader.model.parameters()]
        places = piece.targets.nonzero()[:, 0] + piece.start
        first = int(places[0])
        known = self.kept
        self.forget()  # a call that fails would leave the cache half written
        if known is not None and not (known.weights == weights and _goes_on(piece.ids[:first], known.ids)):
            known = None
        begin, cache = (0, None) if known is None else (len(known.ids), known.cache)
        logits, cache = self.reader.read_on(piece.ids[begin:], cache, max(0, first - 1 - begin))
        if cache is not None:
            self.kept = ReadSoFar(piece.ids, cache, logits[-1:], weights)
        if known is not None and begin == first:
            logits = torch.cat([known.last, logits])
        places = places.to(logits.device)
        return F.cross_entropy(logits[places - first], target_ids([piece]).to(logits.device), reduction="none")


def _goes_on(ids: Int[Tensor, " n"], begun: Int[Tensor, " m"]) -> bool:
    """Whether `ids` begins with `begun`."""
    return len(begun) <= len(ids) and torch.equal(ids[: len(begun)], begun)
