"""What a model learned since it was trained: the differences to its base, and what learning needs to go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A difference of low rank, `left @ right`.

    Attributes:
        left: `[out, rank]`.
        right: `[rank, in]`.
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The difference itself, `[out, in]`."""
        return self.left @ self.right


@dataclass(frozen=True)
class DocumentRecord:
    """What was learned from, and how it went.

    Attributes:
        name: path or title.
        digest: SHA-256 of the document's text, in hexadecimal digits; "" where tokens came from no document.
        tokens: read so far.
        finished: whether its end was reached.
        loss: mean loss of its tokens in nats, each scored before it was learned from.
        started: when, ISO 8601 in UTC.
    """

    name: str
    digest: str
    tokens: int
    finished: bool
    loss: float
    started: str


@dataclass
class Memory:
    """The learned difference to a base model.

    Attributes:
        fingerprint: of the base model, from `continual.fingerprint.base_fingerprint`.
        periods: update period of every level in tokens, fastest first.
        parameters: names of the base model's parameters in every level.
        differences: learned minus base by parameter name, float32, in the parameter's shape or `LowRank`. A parameter
            that has not changed may be left out.
        documents: what was learned from, in order.
        settings: the `Learner`'s settings and counters, JSON values only.
        tensors: what a `Learner` needs besides to go on exactly: optimizer states, gradient sums, tokens not yet
            learned from, the replay buffer. Empty in a memory that is only to be used.
    """

    fingerprint: str
    periods: dict[str, int]
    parameters: dict[str, list[str]]
    differences: dict[str, Tensor | LowRank]
    documents: list[DocumentRecord] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
