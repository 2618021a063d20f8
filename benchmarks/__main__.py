"""The command line of the benchmarks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.breakdown import breakdown
from benchmarks.contention import contention
from benchmarks.decoding import decoding
from benchmarks.learning import learning
from benchmarks.mixers import against_naive, all_mixers
from benchmarks.optimizers import optimizers
from benchmarks.peak_memory import peak_memory
from benchmarks.report import Report, show, write_json
from benchmarks.studying import study_throughput
from benchmarks.throughput import against_attention, against_public
from benchmarks.timing import MIN_ROUNDS
from nestling.errors import UserError
from nestling.processes import refuse_several
from nestling.threads import VARIABLE
from reproductions.harness.machine import processor_name

WIDTH = 120  # of the tables when the output is a file or a pipe


class Suite(StrEnum):
    """What can be run alone."""

    ATTENTION = "attention"
    BREAKDOWN = "breakdown"
    TITANS = "titans"
    MEMORY = "memory"
    DECODING = "decoding"
    MIXERS = "mixers"
    NAIVE = "naive"
    OPTIMIZERS = "optimizers"
    LEARNING = "learning"
    STUDY = "study"
    CONTENTION = "contention"


def main(
    only: Annotated[list[Suite] | None, typer.Option(help="Run this suite alone; may be given several times.")] = None,
    quick: Annotated[bool, typer.Option(help="Short sequences and no verdicts: does it run at all?")] = False,
    full: Annotated[bool, typer.Option(help="Decode each of the 100,000 tokens one at a time.")] = False,
    rounds: Annotated[int, typer.Option(min=MIN_ROUNDS, help="Measured rounds of every comparison.")] = MIN_ROUNDS,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
    json: Annotated[Path | None, typer.Option(help="Also write all figures to this file.")] = None,
) -> None:
    """Speed and memory of the layers. Every verdict is a ratio of medians measured alternately in this run."""
    try:
        refuse_several("python -m benchmarks")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    torch.set_num_threads(threads)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(
        f"{processor_name()}, {threads} threads, torch {torch.__version__}, {rounds} rounds, "
        f"{VARIABLE} {os.environ.get(VARIABLE, 'unset')}\n",
        highlight=False,
    )
    suites: dict[Suite, Callable[[], list[Report]]] = {
        Suite.ATTENTION: lambda: [against_attention(rounds, quick)],
        Suite.BREAKDOWN: lambda: [breakdown(rounds, quick)],
        Suite.TITANS: lambda: [against_public(rounds, quick)],
        Suite.MEMORY: lambda: [peak_memory(quick, threads)],
        Suite.DECODING: lambda: [decoding(rounds, quick, full)],
        Suite.MIXERS: lambda: all_mixers(rounds, quick, threads),
        Suite.NAIVE: lambda: [against_naive(rounds, quick)],
        Suite.OPTIMIZERS: lambda: optimizers(rounds, quick),
        Suite.LEARNING: lambda: [learning(rounds, quick, threads)],
        Suite.STUDY: lambda: [study_throughput(rounds, quick, threads)],
        Suite.CONTENTION: lambda: contention(rounds, quick),
    }
    reports: list[Report] = []
    for suite in only or list(Suite):
        with console.status(f"measuring: {suite}"):
            found = suites[suite]()
        for report in found:
            show(report, console)
        reports += found
    if json is not None:
        write_json(reports, json, threads)
    missed = [verdict for report in reports for verdict in report.verdicts if not verdict.met]
    if missed:
        console.print(f"{len(missed)} of the goals missed", style="red")


if __name__ == "__main__":
    typer.run(main)
