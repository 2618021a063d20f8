"""The parts of a memory: a difference of low rank, and what is known of a document that was read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
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


def dense(difference: Tensor | LowRank) -> Tensor:
    """A difference as one tensor, in the parameter's shape."""
    return difference.dense() if isinstance(difference, LowRank) else difference


def shape_of(difference: Tensor | LowRank) -> tuple[int, ...]:
    """Shape of the parameter a difference belongs to."""
    if isinstance(difference, LowRank):
        return difference.left.shape[0], difference.right.shape[1]
    return tuple(difference.shape)


def tensors_of(difference: Tensor | LowRank) -> tuple[Tensor, ...]:
    """What is stored of a difference."""
    return (difference.left, difference.right) if isinstance(difference, LowRank) else (difference,)


def dot(a: Tensor | LowRank, b: Tensor | LowRank) -> float:
    """Inner product of two differences of one parameter, in float64; low ranks are never multiplied out."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return float(((a.left.double().T @ b.left.double()) * (a.right.double() @ b.right.double().T)).sum())
    return float(torch.dot(dense(a).double().reshape(-1), dense(b).double().reshape(-1)))


def identity(differences: Mapping[str, Tensor | LowRank], samples: int = 64) -> str:
    """What tells one memory's differences from another's: names, shapes and some values of each, as 16 digits."""
    digest = hashlib.sha256()
    for name, difference in sorted(differences.items()):
        digest.update(f"{name}{shape_of(difference)}".encode())
        for tensor in tensors_of(difference):
            flat = tensor.detach().reshape(-1)
            values = flat[:: max(1, flat.numel() // samples)].to(device="cpu", dtype=torch.float64)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
