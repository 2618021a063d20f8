"""What a benchmark hands back, and how it is printed and written."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from reproductions.harness.machine import processor_name


@dataclass(frozen=True)
class Verdict:
    """One figure with its goal.

    Attributes:
        what: a sentence fragment that names the figure.
        value: the measured ratio.
        goal: the bound.
        at_least: True when `value` should reach `goal`, False when it should stay below it.
    """

    what: str
    value: float
    goal: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether the goal holds."""
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return f"{'met   ' if self.met else 'MISSED'}  {self.what}: {self.value:.2f} (goal: {bound} {self.goal:.2f})"


@dataclass
class Report:
    """One table with its verdicts and notes."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def show(report: Report, console: Console) -> None:
    """Print one report."""
    console.print(report.title, style="bold", highlight=False)  # a table's own title wraps at the table's width
    table = Table()
    for i, column in enumerate(report.columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in report.rows:
        table.add_row(*row)
    console.print(table)
    for note in report.notes:
        console.print(f"  {note}", style="dim", highlight=False)
    for verdict in report.verdicts:
        console.print(f"  {verdict}", style="green" if verdict.met else "red", highlight=False)
    console.print()


def write_json(reports: list[Report], path: Path, threads: int) -> None:
    """Write all reports with what identifies the machine and the versions."""
    machine = {"processor": processor_name(), "threads": threads, "python": platform.python_version()}
    versions = {"torch": torch.__version__}
    document = {"machine": machine, "versions": versions, "reports": [asdict(report) for report in reports]}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
