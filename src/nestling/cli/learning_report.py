"""What `nestling learn` tells while it learns, and at the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nestling.cli.console import cell, say
from nestling.continual.learn_documents import Progress
from nestling.continual.learner.learner import Learner
from nestling.continual.store.snapshots import Snapshot
from nestling.continual.store.store import MemoryStore

LINE_SECONDS = 30.0  # between two lines of progress where no terminal shows a bar


@dataclass
class Outcome:
    """One document's line of the table.

    Attributes:
        name: of the document.
        tokens: learned from in this run.
        start: tokens of the document that earlier runs learned from.
        measured: its first tokens, those that are read before and after; 0 for none.
        before, after: loss of those with the base weights and with what was learned; None where not measured.
        losses: of this run's tokens, each before it was learned from.
    """

    name: str
    start: int = 0
    measured: int = 0
    tokens: int = 0
    before: float | None = None
    after: float | None = None
    losses: list[Tensor] = field(default_factory=list)

    @property
    def overall(self) -> float:
        """Mean loss of this run's tokens; NaN before the first."""
        return mean(torch.cat(self.losses)) if self.losses else math.nan

    @property
    def during(self) -> float | None:
        """Mean loss of those of them that are measured before and after too; None where there are none."""
        there = max(0, self.measured - self.start)
        return mean(torch.cat(self.losses)[:there]) if there and self.losses else None

    def add(self, progress: Progress) -> None:
        """Count a step."""
        self.tokens += progress.tokens
        self.losses.append(progress.losses)


class ProgressLines:
    """Lines on standard error for who has no terminal: a log, or a job in the background."""

    def __init__(self, total: int, seconds: float | None = None) -> None:
        """Args: tokens to learn in this run; seconds between two lines at least, `LINE_SECONDS` if None."""
        self.total, self.done = total, 0
        self._seconds = LINE_SECONDS if seconds is None else seconds
        self._since, self._losses, self._began = time.monotonic(), list[Tensor](), 0
        self._told = self._since

    def leave_out(self, seconds: float) -> None:
        """Time that was spent on something else than learning."""
        self._since += seconds

    def writing(self, done: int, total: int) -> None:
        """So many of the tokens to rehearse are written; prints it if it is time."""
        if (now := time.monotonic()) - self._told >= self._seconds:
            print(f"{done:,} of {total:,} tokens written", file=sys.stderr, flush=True)
            self._told = now

    def add(self, progress: Progress) -> None:
        """Count a step; prints tokens done of all, and speed and mean loss since the line before, if it is time."""
        self.done += progress.tokens
        self._losses.append(progress.losses)
        passed = time.monotonic() - self._since
        if passed < self._seconds:
            return
        rate = (self.done - self._began) / max(passed, 1e-9)
        loss = mean(torch.cat(self._losses))
        print(
            f"{self.done:,} of {self.total:,} tokens, {rate:,.1f} tokens/s, mean loss {loss:.4f}",
            file=sys.stderr,
            flush=True,
        )
        self._since, self._losses, self._began = time.monotonic(), [], self.done


def print_outcomes(console: Console, outcomes: Sequence[Outcome], measure: int, seconds: float) -> None:
    """The table of the documents and the speed.

    Args:
        console: where to.
        outcomes: of the documents that were begun.
        measure: tokens of each that were read before and after; 0 for none.
        seconds: that learning took.
    """
    first = f"; before, while, after: of a document's first {measure:,} tokens" if measure else ""
    table = Table(title=f"loss in nats, every token before it was learned from{first}")
    table.add_column("document", overflow="fold")
    measured = ("before", "while", "after") if measure else ()
    for heading in ("tokens", "loss", *measured):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        own = (outcome.before, outcome.during, outcome.after) if measure else ()
        table.add_row(cell(outcome.name), f"{outcome.tokens:,}", *map(_number, (outcome.overall, *own)))
    console.print(table)
    tokens = sum(outcome.tokens for outcome in outcomes)
    if tokens:
        say(console, f"{tokens:,} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.1f} tokens/s")


def print_periods(console: Console, learner: Learner) -> None:
    """How often levels were updated that choose it themselves."""
    adaptive = [level.name for level in learner.optimizer.levels if level.signal_to_noise is not None]
    found = [
        f"{name} {period:,.0f}" for name, period in learner.mean_periods.items() if name in adaptive and period > 0
    ]
    if found:
        say(console, f"tokens between two updates, on average: {', '.join(found)}")


def print_place(
    console: Console, store: MemoryStore, snapshot: Snapshot | None, learner: Learner, stopped: bool
) -> None:
    """Where what was learned is, and how to go on; `snapshot` is None where nothing has been learned."""
    if snapshot is None:
        print("interrupted before anything was learned; the same command begins again", file=sys.stderr)
        return
    if waiting := learner.stream.filled:
        say(console, f"{waiting:,} tokens wait in the memory for a full step of {learner.stream.chunk:,}")
    place = f"{store.path}, snapshot {snapshot.number} ({snapshot.bytes:,} bytes)"
    say(console, f"memory of {snapshot.tokens:,} tokens in {place}")
    if stopped:
        print("interrupted; the same command goes on from here", file=sys.stderr)


def mean(losses: Tensor) -> float:
    """Of those that are numbers; NaN where there is none."""
    return float(losses.double().nanmean())


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"
