"""Learning from whole documents, with a memory on disk that is never more than a little behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nestling.continual.store.memory import Memory
from nestling.continual.store.records import DocumentRecord
from nestling.continual.store.store import MemoryStore
from nestling.continual.stream.chunks import Piece, Stream
from nestling.continual.stream.scoring import Reader, learning, own_modes


class Notes(Protocol):
    """What `Student.observe` returns, as far as it is used here."""

    @property
    def losses(self) -> Tensor:
        """`[n]`, nats, NaN where there was no target."""

    @property
    def notes(self) -> Sequence[str]:
        """What went otherwise than planned."""


class Student(Protocol):
    """The part of a `Learner` that this module uses."""

    @property
    def stream(self) -> Stream:
        """Its chunks: how many tokens one has, and how many the present one still takes."""

    def observe(self, tokens: Tensor, *, document: DocumentRecord | None = None) -> Notes:
        """Score tokens, then learn from them."""

    def end_document(self) -> None:
        """The present document is finished."""

    def memory(self) -> Memory:
        """What was learned, and all that is needed to go on exactly."""


@dataclass(frozen=True)
class Text:
    """A document as tokens.

    Attributes:
        name: path or title.
        digest: SHA-256 of its text.
        ids: `[n]` int64, beginning and end tokens included.
    """

    name: str
    digest: str
    ids: Tensor


@dataclass(frozen=True)
class Progress:
    """A step was learned.

    Attributes:
        tokens: in this step.
        losses: of them, before they were learned from.
        notes: what went otherwise than planned.
    """

    tokens: int
    losses: Tensor
    notes: Sequence[str]


@dataclass
class Autosave:
    """Saves when enough tokens or seconds have passed since the last time.

    Attributes:
        store: where to.
        tokens: None for no such limit.
        seconds: None for no such limit.
    """

    store: MemoryStore
    tokens: int | None = None
    seconds: float | None = 120.0

    def __post_init__(self) -> None:
        self._unsaved, self._since = 0, time.monotonic()

    @property
    def unsaved(self) -> int:
        """Tokens learned since the last save."""
        return self._unsaved

    def count(self, student: Student, tokens: int) -> None:
        """Tokens were learned; saves if it is time."""
        self._unsaved += tokens
        late = self.seconds is not None and time.monotonic() - self._since >= self.seconds
        if late or (self.tokens is not None and self._unsaved >= self.tokens):
            self.save(student)

    def save(self, student: Student) -> None:
        """Save what is not yet on disk, as a snapshot that the next one replaces."""
        if self._unsaved:
            self.store.save(student.memory(), "not finished", autosave=True)
        self._unsaved, self._since = 0, time.monotonic()


def tokens_read(records: Iterable[DocumentRecord], digest: str) -> int | None:
    """Tokens of a document that were learned from, in one part or several; None when it was finished."""
    parts = [r for r in records if r.digest == digest]
    return None if any(r.finished for r in parts) else sum(r.tokens for r in parts)


def learn_text(
    student: Student,
    text: Text,
    start: int,
    autosave: Autosave | None,
    *,
    step: int = 256,
    stop: int | None = None,
    on_step: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Learn from a document to its end, or as far as is said.

    Tokens are given in steps that end with a chunk of the learner's, because those of a chunk that is not full are read
    once for their losses and once more when it is: every token but those after the document's last full chunk is read
    once. A chunk longer than `step` is one step. Parts of it could be stopped between, but would be read twice, and the
    last of them takes as long as all, since it brings the learning from the whole chunk.

    An exception of `on_step` leaves the student whole, after the step: that is the place to stop at.

    Args:
        student: the learner.
        text: the document.
        start: tokens of it that were learned from before.
        autosave: where the memory goes meanwhile; None for nowhere.
        step: tokens given to the learner at once at most, where chunks are not longer; changes no result.
        stop: the token before which it stops; None is the end, which finishes the document.
        on_step: called after every step.
    """
    stop = len(text.ids) if stop is None else min(stop, len(text.ids))
    document = DocumentRecord(text.name, text.digest, 0, False, 0.0, "")
    place = start
    while place < stop:
        ids = text.ids[place : min(stop, place + _whole_chunks(student.stream, step))]
        place += len(ids)
        seen = student.observe(ids, document=document)
        if place == len(text.ids):
            student.end_document()
        if autosave is not None:
            autosave.count(student, len(ids))
        on_step(Progress(len(ids), seen.losses, seen.notes))


def frozen_loss(
    model: nn.Module, ids: Tensor, context: int = 512, on_window: Callable[[int], object] = lambda _: None
) -> float:
    """Mean loss of a text's tokens but the first, in nats, without learning; NaN for fewer than two tokens.

    It is read in windows of `context` tokens that overlap by half, as a `Learner` reads by default, so the three losses
    before, while and after learning differ in the weights alone. The last window is as long as the others, and so
    overlaps more.

    Args:
        model: any causal language model of transformers.
        ids: `[n]`.
        context: tokens in a window.
        on_window: called with the tokens scored since the last call.
    """
    reader, ids = Reader(model), ids.cpu().long()
    stride, done, total = max(1, context // 2), 1, 0.0
    with own_modes(), learning(model, ()):
        while done < len(ids):
            new = min(stride if done > 1 else context - 1, len(ids) - done)
            window = ids[max(0, done + new - context) : done + new]
            piece = Piece(window, len(window) - new, torch.ones(new, dtype=torch.bool))
            total += float(reader.scores([piece]).sum())
            done += new
            on_window(new)
    return total / (len(ids) - 1) if len(ids) > 1 else float("nan")


def _whole_chunks(stream: Stream, most: int) -> int:
    """Tokens to the end of the present chunk, and of as many more as fit."""
    return stream.room + max(0, most - stream.room) // stream.chunk * stream.chunk
