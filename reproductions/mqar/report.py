"""The table and the picture of finished trainings."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from nestling.plotting.scatter import Point, scatter_chart

Row = dict[str, Any]


def write_report(rows: list[Row], tasks: list[str], folder: Path) -> None:
    """`table.md` and `recall.svg` in `folder`, from one rate for every preset and ablation."""
    plain = [r for r in rows if r["ablation"] is None]
    lines = ["| preset | learning rate | " + " | ".join(f"{t}: accuracy (seeds), state" for t in tasks) + " |"]
    lines.append("| --- " * (2 + len(tasks)) + "|")
    points = []
    for name in dict.fromkeys(r["preset"] for r in plain):
        found = {task: [r for r in plain if (r["preset"], r["task"]) == (name, task)] for task in tasks}
        rate = next(r["rate"] for r in plain if r["preset"] == name)
        lines.append(f"| `{name}` | {rate:g} | " + " | ".join(_cell(found[task]) for task in tasks) + " |")
        points += [Point(name, t, r[0]["state_bytes"] / 1024, 100 * _mean(r)) for t, r in found.items() if r]
    ablated = [r for r in rows if r["ablation"] is not None]
    if ablated:
        lines += ["", "| change | to | learning rate | task | accuracy (seeds), state |", "| --- " * 5 + "|"]
        for change in dict.fromkeys(r["ablation"] for r in ablated):
            found_rows = [r for r in ablated if r["ablation"] == change]
            first = found_rows[0]
            cells = f"`{first['preset']}` | {first['rate']:g} | {first['task']} | {_cell(found_rows)}"
            lines.append(f"| {change} | {cells} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    if points:
        chart = scatter_chart(points, x_label="state, KiB (logarithmic)", y_label="accuracy, %")
        (folder / "recall.svg").write_text(chart)
    print("\n".join(lines))


def _mean(rows: list[Row]) -> float:
    return statistics.mean(r["test"] for r in rows)


def _cell(rows: list[Row]) -> str:
    if not rows:
        return "not run"
    each = ", ".join(f"{r['test']:.3f}" + (" diverged" if r["diverged"] else "") for r in rows)
    return f"{_mean(rows):.3f} ({each}), {rows[0]['state_bytes'] / 1024:,.0f} KiB"
