"""The tables and pictures of finished trainings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from nestling.plotting.scatter import Point, scatter_chart
from reproductions.harness.report import EMPTY, table
from reproductions.harness.rows import Row

Groups = dict[tuple[str, str | None], list[Row]]


def presets_table(rows: Sequence[Row], tasks: Sequence[str], picture: str) -> tuple[str, Callable[[], str] | None]:
    """The presets in the order of their accuracy, from one rate for each, and what draws the picture of them.

    The mean of the seeds, the lowest of them, and the largest state of the tasks.

    Args:
        rows: of one setting, at the rates of their presets.
        tasks: names of its difficulties.
        picture: file name; the table ends with it.
    """
    plain = _ordered(rows)
    if not plain:
        return EMPTY, None
    lines = [
        [
            f"`{preset}`",
            f"{found[0]['rate']:g}",
            f"{max(found[0]['state_bytes']) / 1024:,.0f} KiB",
            *(f"{_mean(found, i):.3f} ({min(r['test'][i] for r in found):.3f})" for i in range(len(tasks))),
        ]
        for (preset, _), found in plain.items()
    ]
    points = [
        Point(preset, task, found[0]["state_bytes"][i] / 1024, 100 * _mean(found, i))
        for (preset, _), found in plain.items()
        for i, task in enumerate(tasks)
    ]

    def draw() -> str:
        labels = {"x_label": "state, KiB (logarithmic)", "y_label": "accuracy, %"}
        return scatter_chart(points, **labels, y_range=(0, 100))

    text = table(["preset", "learning rate", "state", *tasks], lines)
    return f"{text}\n\n![accuracy against the size of the state]({picture})", draw


def every_seed(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """The same presets with the accuracy of every seed and the state after every task; arguments as there."""
    lines = [[f"`{preset}`", *_cells(found)] for (preset, _), found in _ordered(rows).items()]
    return table(["preset", "learning rate", *_heads(tasks)], lines) if lines else EMPTY


def ablations(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """A preset unchanged and with one change each.

    Args:
        rows: of one preset, one rate and one number of steps.
        tasks: names of the difficulties.
    """
    lines = [[str(change or "nothing"), *_cells(found)] for (_, change), found in _grouped(rows).items()]
    return table(["change", "learning rate", *_heads(tasks)], lines) if lines else EMPTY


def _heads(tasks: Sequence[str]) -> list[str]:
    return [f"{task}: accuracy (seeds), state" for task in tasks]


def _grouped(rows: Iterable[Row]) -> Groups:
    """Rows by preset and ablation, by seed."""
    groups: Groups = {}
    for row in sorted(rows, key=lambda r: r["seed"]):
        groups.setdefault((row["preset"], row["ablation"]), []).append(row)
    return groups


def _ordered(rows: Sequence[Row]) -> Groups:
    """Presets as they are, the best first."""
    plain = _grouped(r for r in rows if r["ablation"] is None)
    return dict(sorted(plain.items(), key=lambda item: -_overall(item[1])))


def _mean(rows: Sequence[Row], task: int) -> float:
    return statistics.mean(r["test"][task] for r in rows)


def _overall(rows: Sequence[Row]) -> float:
    """Mean accuracy of all tasks and seeds."""
    return statistics.mean(value for row in rows for value in row["test"])


def _cells(rows: Sequence[Row]) -> list[str]:
    cells = [f"{rows[0]['rate']:g}"]
    for i in range(len(rows[0]["test"])):
        each = ", ".join(f"{r['test'][i]:.3f}" + (" diverged" if r["diverged"] else "") for r in rows)
        cells.append(f"{_mean(rows, i):.3f} ({each}), {rows[0]['state_bytes'][i] / 1024:,.0f} KiB")
    return cells
