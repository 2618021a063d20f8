"""Which documents were learned from, and how it went."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from nestling.continual.store.memory import DocumentRecord


class Document(Protocol):
    """What names a document; a `DocumentRecord` does."""

    @property
    def name(self) -> str:
        """Path or title."""

    @property
    def digest(self) -> str:
        """SHA-256 of its text, or ""."""


class DocumentLog:
    """The records of all documents, the present one last.

    Tokens of no document share one record without a name for as long as no named document comes between.

    Attributes:
        records: in order.
        present: whether the last record is of the document that is being read.
        total, targets: sum of the losses of the last record, and their number.
    """

    def __init__(self) -> None:
        self.records: list[DocumentRecord] = []
        self.present = False
        self.total, self.targets = 0.0, 0

    def is_present(self, document: Document | None) -> bool:
        """Whether this is the document that is being read; None is whatever that is."""
        if document is None:
            return self.present
        last = self.records[-1] if self.present else None
        return last is not None and (last.name, last.digest) == (document.name, document.digest)

    def begin(self, document: Document | None) -> None:
        """Go on with another document."""
        self.present = True
        name, digest = ("", "") if document is None else (document.name, document.digest)
        if not name and self.records and not self.records[-1].name:
            self.records[-1] = replace(self.records[-1], finished=False)
            return
        self.total, self.targets = 0.0, 0
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self.records.append(DocumentRecord(name, digest, 0, False, 0.0, started))

    def add(self, losses: Float[Tensor, " n"]) -> None:
        """Count tokens of the present document; NaN is no loss, and what is not finite enters no mean."""
        finite = [value for value in losses.tolist() if math.isfinite(value)]
        self.total, self.targets = self.total + sum(finite), self.targets + len(finite)
        last = self.records[-1]
        mean = self.total / self.targets if self.targets else 0.0
        self.records[-1] = replace(last, tokens=last.tokens + len(losses), loss=mean)

    def end(self, finished: bool) -> None:
        """The present document, if there is one, is left."""
        if self.present:
            self.records[-1] = replace(self.records[-1], finished=finished)
        self.present = False
