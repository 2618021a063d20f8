"""Addition of n numbers, digit by digit (the n-ary addition of Saunshi et al. 2025, arXiv:2502.17416, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from nestling.tasks.associative_recall import IGNORE

PLUS, EQUALS = 10, 11


@dataclass(frozen=True)
class AdditionTask:
    """One difficulty.

    Attributes:
        operands: numbers that are added, of evenly drawn digits.
        digits: of every number.

    The vocabulary: tokens 0 to 9 are the digits, 10 is the plus sign and 11 the equals sign. Every number, the sum too,
    is written from its lowest digit, so that a digit of the sum follows from what stands before it. `12 + 34 = 046` is
    `2 1 + 4 3 = 6 4 0`: the sum has as many digits as the largest one needs.

    Raises:
        ValueError: fewer than two numbers, or no digit.
    """

    operands: int
    digits: int = 3

    def __post_init__(self) -> None:
        if self.operands < 2 or self.digits < 1:
            raise ValueError(f"a sum needs 2 numbers of 1 digit at least, not {self.operands} of {self.digits}")

    @property
    def vocab_size(self) -> int:
        """Digits and two signs."""
        return EQUALS + 1

    @property
    def answer_digits(self) -> int:
        """Digits of a sum."""
        return len(str(self.operands * (10**self.digits - 1)))

    @property
    def length(self) -> int:
        """Tokens of a sequence; the last digit of the sum is nobody's input."""
        return self.operands * (self.digits + 1) + self.answer_digits - 1

    def sample(
        self, rows: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"]]:
        """Tokens, and from the equals sign on at every place the next digit of the sum (`IGNORE` before).

        Args:
            rows: sums.
            generator: on the CPU.
        """
        numbers = torch.randint(0, 10, (rows, self.operands, self.digits), generator=generator)
        total = (numbers * 10 ** torch.arange(self.digits)).sum((1, 2))
        answer = total[:, None] // 10 ** torch.arange(self.answer_digits) % 10
        signs = torch.full((rows, self.operands, 1), PLUS)
        signs[:, -1] = EQUALS
        question = torch.cat((numbers, signs), 2).flatten(1)
        nothing = torch.full_like(question[:, 1:], IGNORE)
        return torch.cat((question, answer[:, :-1]), 1), torch.cat((nothing, answer), 1)
