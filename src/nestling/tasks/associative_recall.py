"""Multi-query associative recall (MQAR; Arora et al. 2023, "Zoology", arXiv:2312.04927, section 4 and appendix).

A sequence begins with key-value pairs, all keys different. Later every key comes again once as a query, and there the
model has to name its value. The distance of a query follows a power law, so that most come soon.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class RecallTask:
    """One difficulty.

    Attributes:
        length: tokens of a sequence.
        pairs: key-value pairs at its start, each asked once.
        vocab_size: the lower half are keys (not token 0), the upper half values.
        power: exponent of the distances, p(d) ~ d^(power - 1); 0.01 is the paper's.
        fill: put any tokens but 0, keys included, where nothing is asked, as the paper does; else token 0.

    Raises:
        ValueError: more pairs than keys, or a sequence too short for pairs and queries.
    """

    length: int
    pairs: int
    vocab_size: int = 8192
    power: float = 0.01
    fill: bool = True

    def __post_init__(self) -> None:
        if self.pairs < 1 or 4 * self.pairs > self.length:
            raise ValueError(
                f"{self.pairs} pairs and as many queries need at least {4 * self.pairs} tokens, not {self.length}"
            )
        if self.pairs > self.vocab_size // 2 - 1:
            raise ValueError(
                f"{self.pairs} different keys need a vocabulary of {2 * self.pairs + 2}, not {self.vocab_size}"
            )

    def sample(
        self, rows: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"]]:
        """Tokens, and at every query its value (`IGNORE` elsewhere): the answer belongs to the query's own position.

        Args:
            rows: sequences.
            generator: on the CPU.
        """
        half, start = self.vocab_size // 2, 2 * self.pairs
        keys = _distinct(torch.ones(rows, half - 1), self.pairs, generator) + 1
        values = torch.randint(half, self.vocab_size, (rows, self.pairs), generator=generator)
        # Queries stand at even distances, as in the paper's data, so that a random value may follow each of them.
        slots = (self.length - start) // 2
        weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (self.power - 1)
        places = start + 2 * _distinct(weights.expand(rows, slots), self.pairs, generator)

        tokens = torch.zeros(rows, self.length, dtype=torch.long)
        if self.fill:
            tokens = torch.randint(1, self.vocab_size, (rows, self.length), generator=generator)
        tokens[:, 0:start:2], tokens[:, 1:start:2] = keys, values
        answers = torch.full_like(tokens, IGNORE)
        tokens.scatter_(1, places, keys)
        answers.scatter_(1, places, values)
        return tokens, answers


@dataclass(frozen=True)
class OverwriteTask:
    """Values that change: pairs, then other values for the same keys, then every key asked once for its last value.

    Each of the three stands in a block of its own, so that a memory which takes its gradients at the start of a chunk
    of that length has stored the first values when the second ones come. Where nothing is said stands token 0.

    Attributes:
        block: tokens of each of the three parts.
        pairs: key-value pairs.
        vocab_size: the lower half are keys (not token 0), the upper half values.

    Raises:
        ValueError: more pairs than keys, or than a block holds.
    """

    block: int
    pairs: int
    vocab_size: int = 128

    def __post_init__(self) -> None:
        if self.pairs < 1 or 2 * self.pairs > self.block:
            raise ValueError(f"{self.pairs} pairs need blocks of at least {2 * self.pairs} tokens, not {self.block}")
        if self.pairs > self.vocab_size // 2 - 1:
            raise ValueError(
                f"{self.pairs} different keys need a vocabulary of {2 * self.pairs + 2}, not {self.vocab_size}"
            )

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 3 * self.block

    def sample(
        self, rows: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"]]:
        """Tokens, and at every query the key's second value (`IGNORE` elsewhere); arguments as in `RecallTask`."""
        half, block = self.vocab_size // 2, self.block
        keys = _distinct(torch.ones(rows, half - 1), self.pairs, generator) + 1
        values = torch.randint(half, self.vocab_size, (2, rows, self.pairs), generator=generator)
        tokens = torch.zeros(rows, self.length, dtype=torch.long)
        answers = torch.full_like(tokens, IGNORE)
        for part in range(3):
            order = _distinct(torch.ones(rows, self.pairs), self.pairs, generator)
            places = part * block + 2 * _distinct(torch.ones(rows, block // 2), self.pairs, generator).sort(-1).values
            tokens.scatter_(1, places, keys.gather(1, order))
            if part < 2:
                tokens.scatter_(1, places + 1, values[part].gather(1, order))
            else:
                answers.scatter_(1, places, values[1].gather(1, order))
        return tokens, answers


def _distinct(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different indices a row, drawn without replacement in proportion to the weights."""
    return torch.multinomial(weights, count, generator=generator)
