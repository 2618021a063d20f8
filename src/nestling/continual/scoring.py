"""Scores of a chunk that is not full yet, without reading again what has been read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nestling.continual.pieces import Piece, batches, placed
from nestling.continual.reading import Reader, target_ids
from nestling.models.cache import ModelState

Versions = list[tuple[int, int]]
# Their factors change with the length read, and cached keys keep the old ones.
LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")


@dataclass(frozen=True)
class ReadSoFar:
    """A model after the tokens of a piece that goes on.

    Attributes:
        ids: `[n]`, the tokens.
        cache: what the model keeps of them, as `past_key_values`.
        last: `[1, vocab]`, its logits after the last of them.
        versions: places and versions of the parameters it was read with.
    """

    ids: Int[Tensor, " n"]
    cache: Any
    last: Float[Tensor, "1 vocab"]
    versions: Versions


class Scorer:
    """Scores the tokens that a call brings; the piece they belong to goes on with the next call.

    With `keep` the model's cache of the last piece is kept, so that a call costs its own tokens. It is used only while
    the piece goes on from the very tokens and with the very weights it was read with, and if it holds nothing but
    attention's keys and values or a `ModelState`: many recurrent models of transformers go on rightly from one token
    at a time only. Other models are read anew.

    Args:
        reader: of the model.
        keep: see `Options.cache_scores`.
    """

    def __init__(self, reader: Reader, keep: bool = False) -> None:
        self.reader = reader
        self.keep = keep and reader.remembers and not _rope_depends_on_length(reader.model)
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
            read = self._continued(wanted[-1]) if self.keep else self.reader.scores(wanted[-1:])
            found.append(read.cpu().float())
        losses = placed(wanted, torch.cat(found) if found else torch.empty(0))
        return losses[-sum(own for _, own in held) :]

    def _continued(self, piece: Piece) -> Float[Tensor, " targets"]:
        """Losses of a piece's targets, read on from where an earlier call stopped if it can be."""
        versions = [(p.data_ptr(), p._version) for p in self.reader.model.parameters()]
        places = piece.targets.nonzero()[:, 0] + piece.start
        first = int(places[0])
        known = self.kept
        self.forget()  # a call that fails would leave the cache half written
        if known is not None and not (known.versions == versions and _begins(piece.ids[:first], known.ids)):
            known = None
        begin, cache = (0, None) if known is None else (len(known.ids), known.cache)
        logits, cache = self.reader.read_on(piece.ids[begin:], cache, max(0, first - 1 - begin))
        if _goes_on_rightly(cache):
            self.kept = ReadSoFar(piece.ids, cache, logits[-1:].clone(), versions)
        if known is not None and begin == first:
            logits = torch.cat([known.last, logits])
        places = places.to(logits.device)
        return F.cross_entropy(logits[places - first], target_ids([piece]).to(logits.device), reduction="none")


def _begins(ids: Int[Tensor, " n"], begun: Int[Tensor, " m"]) -> bool:
    """Whether `ids` begins with `begun`."""
    return len(begun) <= len(ids) and torch.equal(ids[: len(begun)], begun)


def _goes_on_rightly(cache: Any) -> bool:
    """Exact types: some recurrent layers and caches are subclasses of attention's."""
    if isinstance(cache, ModelState):
        return True
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)


def _rope_depends_on_length(model: nn.Module) -> bool:
    said = str(getattr(getattr(model, "config", None), "rope_parameters", None))
    return any(kind in said for kind in LENGTH_DEPENDENT_ROPE)
