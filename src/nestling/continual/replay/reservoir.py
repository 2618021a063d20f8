"""A replay buffer of fixed capacity: a uniform sample of everything seen so far, whatever its length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

ADD, SAMPLE = 0, 1


@dataclass(frozen=True)
class ReservoirItem:
    """What a reservoir holds.

    Attributes:
        tokens: `[n]`, int64, n >= 1.
        metadata: whole numbers by name, for example the class, or how many of the tokens are a prompt.
    """

    tokens: Tensor
    metadata: dict[str, int] = field(default_factory=dict)


class Reservoir:
    """Reservoir sampling (Vitter 1985, algorithm R): after N items each of them is kept with probability capacity / N.

    Nothing of the order, the number of classes or the length of the stream need be known beforehand, and task borders
    play no part. Random numbers are a function of the seed and of how many items were added or draws made, so there is
    no generator to save: a reservoir that was saved and loaded goes on exactly.

    Args:
        capacity: items kept, 1 or more.
        seed: 0 or more.

    Raises:
        ValueError: capacity or seed out of range.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if not _whole(capacity) or capacity < 1:
            raise ValueError(f"capacity is a number of items, 1 or more, not {capacity!r}")
        if not _whole(seed) or seed < 0:
            raise ValueError(f"seed is a whole number, 0 or more, not {seed!r}")
        self.capacity, self.seed = capacity, seed
        self.items: list[ReservoirItem] = []
        self.seen = 0
        self.draws = 0

    def __len__(self) -> int:
        """Items held."""
        return len(self.items)

    def add(self, tokens: Tensor, metadata: Mapping[str, int] | None = None) -> bool:
        """Offer an item; True if it was kept (another one may have left for it). The tokens are copied.

        Args:
            tokens: `[n]`, int64, n >= 1.
            metadata: whole numbers by name.

        Raises:
            ValueError: tokens of another shape or kind, metadata that are no whole numbers.
        """
        item = _checked(tokens, dict(metadata or {}))
        self.seen += 1
        if len(self.items) < self.capacity:
            self.items.append(item)
            return True
        place = int(self._random(ADD, self.seen).integers(self.seen))
        if place < self.capacity:
            self.items[place] = item
        return place < self.capacity

    def sample(self, n: int) -> list[ReservoirItem]:
        """`n` different items held, at random, or all of them in random order if fewer are held.

        Raises:
            ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"n is a number of items, 0 or more, not {n}")
        self.draws += 1
        order = self._random(SAMPLE, self.draws).permutation(len(self.items))
        return [self.items[i] for i in order[:n]]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything: tensors (`tokens` of all items on end, and their `lengths`) and values that JSON can hold."""
        tokens = torch.cat([item.tokens for item in self.items]) if self.items else torch.empty(0, dtype=torch.int64)
        lengths = torch.tensor([len(item.tokens) for item in self.items], dtype=torch.int64)
        counters = {"capacity": self.capacity, "seed": self.seed, "seen": self.seen, "draws": self.draws}
        return {"tokens": tokens, "lengths": lengths}, counters | {"metadata": [dict(i.metadata) for i in self.items]}

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Reservoir:
        """The reservoir that `state` was taken of. What it is given is checked, as it may come from a file.

        Raises:
            ValueError: something is missing, of another kind, or does not fit together.
        """
        missing = [k for k in ("tokens", "lengths") if k not in tensors]
        missing += [k for k in ("capacity", "seed", "seen", "draws", "metadata") if k not in values]
        if missing:
            raise ValueError(f"the saved reservoir lacks {', '.join(missing)}")
        made = cls(values["capacity"], values["seed"])
        tokens, lengths, metadata = tensors["tokens"], tensors["lengths"], values["metadata"]
        if any(t.dim() != 1 or t.dtype != torch.int64 for t in (tokens, lengths)):
            raise ValueError("tokens and lengths of a saved reservoir are one-dimensional int64 tensors")
        sizes: Sequence[int] = lengths.tolist()
        if min(sizes, default=1) < 1 or sum(sizes) != len(tokens):
            raise ValueError(f"a saved reservoir's lengths do not cut its {len(tokens)} tokens into items")
        if not isinstance(metadata, list) or len(metadata) != len(sizes):
            raise ValueError(f"a saved reservoir of {len(sizes)} items has as many metadata, a list of dictionaries")
        for name in ("seen", "draws"):
            if not _whole(values[name]) or values[name] < 0:
                raise ValueError(f"{name} of a saved reservoir is a whole number, 0 or more, not {values[name]!r}")
        if len(sizes) != min(made.capacity, values["seen"]):
            raise ValueError(
                f"a reservoir of capacity {made.capacity} that saw {values['seen']} items does not hold {len(sizes)}"
            )
        made.items = [_checked(t, m) for t, m in zip(tokens.split(list(sizes)), metadata, strict=True)] if sizes else []
        made.seen, made.draws = values["seen"], values["draws"]
        return made

    def _random(self, purpose: int, count: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, purpose, count))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked(tokens: Tensor, metadata: dict[str, int]) -> ReservoirItem:
    if not isinstance(tokens, Tensor) or tokens.dim() != 1 or tokens.dtype != torch.int64 or not len(tokens):
        found = (
            f"{tokens.dtype} of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        )
        raise ValueError(f"tokens of a reservoir's item are int64 of shape [n] with n >= 1, not {found}")
    if not isinstance(metadata, dict) or not all(isinstance(k, str) and _whole(v) for k, v in metadata.items()):
        raise ValueError(f"metadata of a reservoir's item are whole numbers by name, not {metadata!r}")
    return ReservoirItem(tokens.detach().cpu().clone(), dict(metadata))
