"""The tables of finished trainings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row

ORDER = ("once", "looped", "deep")


def make_report(rows: Sequence[Row], tasks: Mapping[str, Sequence[str]]) -> Report:
    """A table of every task, and of the looped models one more: how often they are run.

    Args:
        rows: in whatever number.
        tasks: names of every task's difficulties.
    """
    parts: dict[str, list[str]] = {"results": [], "loops": []}
    for task, difficulties in tasks.items():
        own = chosen([row for row in rows if row["task"] == task])
        if own:
            parts["results"].append(_accuracy(own, difficulties))
            parts["loops"].append(_loops(own, difficulties))
    return Report({name: "\n\n".join(filter(None, tables)) or EMPTY for name, tables in parts.items()})


def chosen(rows: Sequence[Row]) -> list[list[Row]]:
    """The longest trainings of every preset and model, by seed."""
    steps = max((row["steps"] for row in rows), default=0)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda r: (r["preset"] != "transformer", ORDER.index(r["model"]), r["seed"])):
        if row["steps"] == steps:
            groups.setdefault((row["preset"], row["model"]), []).append(row)
    return list(groups.values())


def _accuracy(groups: Sequence[Sequence[Row]], difficulties: Sequence[str]) -> str:
    lines = []
    for rows in groups:
        cells = [_told([row["test"][i] for row in rows]) for i in range(len(difficulties))]
        lines.append([f"`{rows[0]['preset']}`", rows[0]["model"], f"{rows[0]['block_parameters']:,}", *cells])
    return table(["preset", "model", "parameters of blocks", *difficulties], lines)


def _loops(groups: Sequence[Sequence[Row]], difficulties: Sequence[str]) -> str:
    lines = []
    for rows in groups:
        for loops in rows[0].get("loops", ()):
            cells = [_told([row["loops"][loops][i] for row in rows]) for i in range(len(difficulties))]
            lines.append([f"`{rows[0]['preset']}`", loops, *cells])
    return table(["preset", "run with loops", *difficulties], lines) if lines else ""


def _told(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})"
