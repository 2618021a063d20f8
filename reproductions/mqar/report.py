"""The table and the picture of finished trainings."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from nestling.plotting.scatter import Point, scatter_chart
from reproductions.harness.result_file import Row

Groups = dict[tuple[str, str | None], list[Row]]


def write_report(rows: list[Row], tasks: list[str], folder: Path) -> None:
    """`table.md` and `recall.svg` in `folder`, from one rate for every preset and ablation.

    Ablations stand under their unchanged preset, at the seeds they have.
    """
    head = " | ".join(f"{task}: accuracy (seeds), state" for task in tasks)
    plain = _grouped(r for r in rows if r["ablation"] is None)
    ablated = _grouped(r for r in rows if r["ablation"] is not None)
    seeds = {r["seed"] for found in ablated.values() for r in found}
    bases = {preset: [r for r in plain.get((preset, None), ()) if r["seed"] in seeds] for preset, _ in ablated}
    ablated = {(preset, "nothing"): found for preset, found in bases.items() if found} | ablated
    lines = [f"| preset | learning rate | {head} |", "| --- " * (2 + len(tasks)) + "|"]
    lines += [f"| `{preset}` | {_line(found, len(tasks))}" for (preset, _), found in plain.items()]
    if ablated:
        lines += ["", f"| change | to | learning rate | {head} |", "| --- " * (3 + len(tasks)) + "|"]
        lines += [
            f"| {change} | `{preset}` | {_line(found, len(tasks))}" for (preset, change), found in ablated.items()
        ]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    points = [
        Point(preset, task, found[0]["state_bytes"][i] / 1024, 100 * _mean(found, i))
        for (preset, _), found in plain.items()
        for i, task in enumerate(tasks)
    ]
    if points:
        chart = scatter_chart(points, x_label="state, KiB (logarithmic)", y_label="accuracy, %")
        (folder / "recall.svg").write_text(chart)
    print("\n".join(lines))


def _grouped(rows: Iterable[Row]) -> Groups:
    """Rows by preset and ablation, by seed."""
    groups: Groups = {}
    for row in sorted(rows, key=lambda r: r["seed"]):
        groups.setdefault((row["preset"], row["ablation"]), []).append(row)
    return groups


def _mean(rows: list[Row], task: int) -> float:
    return statistics.mean(r["test"][task] for r in rows)


def _line(rows: list[Row], tasks: int) -> str:
    cells = [f"{rows[0]['rate']:g}"]
    for i in range(tasks):
        each = ", ".join(f"{r['test'][i]:.3f}" + (" diverged" if r["diverged"] else "") for r in rows)
        cells.append(f"{_mean(rows, i):.3f} ({each}), {rows[0]['state_bytes'][i] / 1024:,.0f} KiB")
    return " | ".join(cells) + " |"
