"""The table and the picture of all finished trainings."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from nestling.plotting.scatter import Point, scatter_chart


def write_report(rows: list[dict[str, Any]], folder: Path) -> None:
    """`table.md` and `recall.svg` in `folder`."""
    plain = [r for r in rows if r["ablation"] is None]
    tasks = list(dict.fromkeys(r["task"] for r in plain))
    names = list(dict.fromkeys(r["preset"] for r in plain))
    lines = ["| preset | learning rate | " + " | ".join(f"{t}: accuracy (seeds), state" for t in tasks) + " |"]
    lines.append("| --- " * (2 + len(tasks)) + "|")
    points = []
    for name in names:
        rate = _chosen(plain, name)
        cells = []
        for task in tasks:
            found = [r for r in plain if (r["preset"], r["task"], r["rate"]) == (name, task, rate)]
            cells.append(_cell(found))
            if found:
                mean = statistics.mean(r["test"] for r in found)
                points.append(Point(name, task, found[0]["state_bytes"] / 1024, 100 * mean))
        lines.append(f"| `{name}` | {rate:g} | " + " | ".join(cells) + " |")
    ablated = [r for r in rows if r["ablation"] is not None]
    if ablated:
        lines += ["", "| change to `titans_lmm` | accuracy (seeds), state |", "| --- | --- |"]
        for change in dict.fromkeys(r["ablation"] for r in ablated):
            lines.append(f"| {change} | {_cell([r for r in ablated if r['ablation'] == change])} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    chart = scatter_chart(points, x_label="state, KiB (logarithmic)", y_label="accuracy, %")
    (folder / "recall.svg").write_text(chart)
    print("\n".join(lines))


def _chosen(rows: list[dict[str, Any]], preset: str) -> float:
    """The rate that went through all tasks: the one with the most rows."""
    rates = [r["rate"] for r in rows if r["preset"] == preset]
    return float(max(set(rates), key=rates.count))


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "not run"
    values = [r["test"] for r in rows]
    each = ", ".join(f"{v:.3f}" for v in values)
    return f"{statistics.mean(values):.3f} ({each}), {rows[0]['state_bytes'] / 1024:,.0f} KiB"
