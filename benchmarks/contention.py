"""Two runs on one machine: how long OpenMP threads should wait busily for each other (`nestling.threads`).

Every setting has two processes of its own, started once, with as many threads as there are processors. In every round
they compute alone, both at once, one beside a busy process, and one on a single processor, as in a container with a
quota, setting after setting.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.report import Report, Verdict
from benchmarks.worker import SUBJECTS
from nestling.threads import SAID_BY_THE_USER, SPINS, VARIABLE

SETTINGS: tuple[str | None, ...] = (None, "0", "1000", "3000", "10000", "30000")  # None is the runtime's own
SCENARIOS = ("alone", "two at once, each", "beside a busy process", "on one processor")
TITLE = "Speed by GOMP_SPINCOUNT, as a part of one run alone with the runtime's own"
NAMES = {"torch": "torch's products (transformer)", "native": "C++ kernels (hope)"}
CPUS = 2  # and threads; more show the same


class Worker:
    """A process of `benchmarks.worker`."""

    def __init__(self, subject: str, spins: str | None) -> None:
        """Start it; `None` leaves the number of spins to the runtime."""
        kept = {name: value for name, value in os.environ.items() if name not in SAID_BY_THE_USER}
        said = {} if spins is None else {VARIABLE: spins}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", subject],
            env=kept | said | {"OMP_NUM_THREADS": str(CPUS), "MKL_NUM_THREADS": str(CPUS)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def begin(self, seconds: float, cpus: int = CPUS) -> None:
        """Tell it to compute."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds} {cpus}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError("a worker of the benchmark has died")
        return line


@dataclass
class Measured:
    """Steps a second of one setting, by scenario, an entry for every round."""

    rates: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in SCENARIOS})


def contention(rounds: int, quick: bool) -> list[Report]:
    """A table for torch's products and one for the C++ kernels."""
    return [_table(subject, 1 if quick else rounds, 0.2 if quick else 0.6) for subject in SUBJECTS]


def _table(subject: str, rounds: int, seconds: float) -> Report:
    found = _measure(subject, rounds, seconds)
    report = Report(f"{TITLE}: {NAMES[subject]}", ["spins", *SCENARIOS])
    base = found[None].rates["alone"]
    for spins, measured in found.items():
        cells = []
        for name in SCENARIOS:
            ratios = [rate / alone for rate, alone in zip(measured.rates[name], base, strict=True)]
            cells.append(f"{statistics.median(ratios):.0%} ({min(ratios):.0%} to {max(ratios):.0%})")
        report.rows.append(["the runtime's own" if spins is None else f"{int(spins):,}", *cells])
    chosen = {name: statistics.median(found[SPINS].rates[name]) / statistics.median(base) for name in SCENARIOS}
    report.verdicts = [
        Verdict(f"{SPINS} spins, alone", chosen["alone"], 0.9),
        Verdict(f"{SPINS} spins, each of two at once", chosen["two at once, each"], 0.4),
    ]
    report.notes.append(
        f"{CPUS} threads on {CPUS} processors; medians of {rounds} rounds of {seconds:g} s (smallest to largest)"
    )
    return report


def _measure(subject: str, rounds: int, seconds: float) -> dict[str | None, Measured]:
    found = {spins: Measured() for spins in SETTINGS}
    with ExitStack() as stack:
        busy = stack.enter_context(Worker("busy", None))
        pairs = {spins: [stack.enter_context(Worker(subject, spins)) for _ in range(2)] for spins in SETTINGS}
        for worker in [busy, *(worker for pair in pairs.values() for worker in pair)]:
            assert worker.answer() == "ready"
        for round_index in range(rounds):
            for spins in SETTINGS if round_index % 2 == 0 else reversed(SETTINGS):
                for name, rate in _round(pairs[spins], busy, seconds).items():
                    found[spins].rates[name].append(rate)
    return found


def _round(pair: list[Worker], busy: Worker, seconds: float) -> dict[str, float]:
    """Every scenario once."""
    first, second = pair
    first.begin(seconds)
    alone = float(first.answer())
    for worker in pair:
        worker.begin(seconds)
    both = [float(worker.answer()) for worker in pair]
    busy.begin(seconds, 1)
    first.begin(seconds)
    beside = float(first.answer())
    busy.answer()
    second.begin(seconds, 1)
    squeezed = float(second.answer())
    return dict(zip(SCENARIOS, (alone, statistics.mean(both), beside, squeezed), strict=True))
