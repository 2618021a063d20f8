"""p-hop induction (Sanford, Hsu and Telgarsky 2024, arXiv:2402.09268, section 4): recall, several times over.

A hop from a place leads behind the latest earlier place with the same symbol, as an induction head looks: in `a b c a`
from the last `a` to `b`. The answer at every place is the symbol p hops away. p hops of one step each need depth p;
attention can double its hops in every layer, and needs about log2(p) layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from nestling.tasks.associative_recall import IGNORE


@dataclass(frozen=True)
class HopTask:
    """One difficulty.

    Attributes:
        length: tokens of a sequence.
        hops: p.
        most: the most hops that the vocabulary can ask for, so that one model takes tasks of several p.
        symbols: of which no two neighbours are equal, as in the paper's data. A hop goes back by about as many places.

    The vocabulary: tokens 0 to symbols - 1 are the symbols, symbols + p - 1 asks for p hops. A sequence is one such
    token and then symbols.

    Raises:
        ValueError: no hop or more than `most`, fewer than three symbols, of which neighbours can be drawn, or a
            sequence in which nothing can be asked.
    """

    length: int
    hops: int
    most: int
    symbols: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.hops <= self.most:
            raise ValueError(f"a task asks for 1 to {self.most} hops, not {self.hops}")
        if self.symbols < 3:
            raise ValueError(f"a string without equal neighbours needs at least 3 symbols, not {self.symbols}")
        if self.length < self.hops + 3:
            raise ValueError(f"{self.hops} hops need at least {self.hops + 3} tokens, not {self.length}")

    @property
    def vocab_size(self) -> int:
        """Symbols, and a token for every number of hops."""
        return self.symbols + self.most

    def sample(
        self, rows: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"]]:
        """Tokens, and at every place the symbol `hops` away (`IGNORE` where so many hops do not lead back).

        Args:
            rows: sequences.
            generator: on the CPU.
        """
        first = torch.randint(0, self.symbols, (rows, 1), generator=generator)
        steps = torch.randint(1, self.symbols, (rows, self.length - 2), generator=generator)
        text = torch.cat((first, steps), 1).cumsum(1) % self.symbols
        places = hop(text, torch.arange(self.length - 1).expand(rows, -1))
        for _ in range(self.hops - 1):
            places = hop(text, places)
        found = torch.where(places < 0, IGNORE, text.gather(1, places.clamp_min(0)))
        asked = torch.full((rows, 1), self.symbols + self.hops - 1)
        return torch.cat((asked, text), 1), torch.cat((torch.full((rows, 1), IGNORE), found), 1)


def hop(text: Int[Tensor, "rows time"], places: Int[Tensor, "rows time"]) -> Int[Tensor, "rows time"]:
    """One hop from every place: behind the latest earlier place with the same symbol; -1 from -1, or if there is none.

    Args:
        text: symbols.
        places: into `text`.
    """
    time = torch.arange(text.shape[1])
    behind = ((text[:, :, None] == text[:, None, :]) & (time < time[:, None])) * (time + 1)
    target = behind.amax(-1)
    target = torch.where(target == 0, -1, target)
    return torch.where(places < 0, -1, target.gather(1, places.clamp_min(0)))
