"""Alternating measurements and their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

MIN_ROUNDS = 5


@dataclass(frozen=True)
class Subject:
    """Something to time.

    Attributes:
        name: as the table shows it.
        step: one unit of work (a forward and a backward pass, a block of decoded tokens).
        tokens: tokens that one step processes.
        flops: floating-point operations that one step cannot do without, or None where no count is known.
        module: what the step runs, where somebody wants its forward pass alone.
    """

    name: str
    step: Callable[[], object]
    tokens: int
    flops: float | None = None
    module: nn.Module | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds per step of one subject, one entry per round."""

    subject: Subject
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Rate at the median."""
        return self.subject.tokens / self.median

    @property
    def gflops(self) -> float | None:
        """Billions of necessary floating-point operations per second at the median."""
        return None if self.subject.flops is None else self.subject.flops / self.median / 1e9


@dataclass(frozen=True)
class Ratio:
    """Median, smallest and largest of the per-round ratios."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


def interleave(subjects: Sequence[Subject], rounds: int, warmup: int = 1) -> list[Timing]:
    """Time all subjects in alternation, so that a slow minute of the machine hits each of them.

    The order is reversed every second round: whoever runs second profits or suffers from the caches as often as the
    other.

    Args:
        subjects: what to time.
        rounds: measured rounds.
        warmup: rounds run before and thrown away (allocation, thread start, compilation).
    """
    for _ in range(warmup):
        for subject in subjects:
            subject.step()
    seconds: list[list[float]] = [[] for _ in subjects]
    for round_index in range(rounds):
        order = range(len(subjects)) if round_index % 2 == 0 else reversed(range(len(subjects)))
        for i in order:
            start = time.perf_counter()
            subjects[i].step()
            seconds[i].append(time.perf_counter() - start)
    return [Timing(subject, tuple(taken)) for subject, taken in zip(subjects, seconds, strict=True)]


def speed_ratio(timing: Timing, baseline: Timing) -> Ratio:
    """Tokens per second of `timing` over those of `baseline`, round by round (a round's two steps run side by side)."""
    scale = timing.subject.tokens / baseline.subject.tokens
    ratios = [scale * b / a for a, b in zip(timing.seconds, baseline.seconds, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def matmul_gflops(size: int = 1024, rounds: int = 7) -> float:
    """The machine's float32 rate on a square matrix product, 10^9 operations per second: what 100% means here."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    timing = interleave([Subject("matmul", lambda: a @ b, tokens=size)], rounds, warmup=2)[0]
    return 2.0 * size**3 / timing.median / 1e9
