"""The table and the pictures of finished runs."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from nestling.plotting.curves import Series, line_chart
from nestling.plotting.matrix import matrix_chart
from reproductions.figure6.methods import METHODS
from reproductions.harness.level_records import levels_tables
from reproductions.harness.result_file import Row

DRAWN = ("levels_memory", "memory", "external_learner", "replay_large", "lora", "fine_tuning")


def write_report(rows: list[Row], name: str, folder: Path) -> None:
    """`name`-table.md, with the levels' measures where there are such, `name`-accuracy.svg and `name`-matrix.svg of a
    set's test rows with the newest row's sizes.

    Of a method, the rows with its newest settings: a grid that has grown may have changed the choice.
    """
    mine = [row for row in rows if row["set"] == name and row["part"] == "test" and not row["diverged"]]
    if not mine:
        return
    keys = ("model", "sizes", "layers", "blocks", "greedy", "max_tokens")
    mine = [row for row in mine if all(row[key] == mine[-1][key] for key in keys)]
    found = {method: [row for row in mine if row["method"] == method] for method in METHODS}
    found = {m: [row for row in own if row["options"] == own[-1]["options"]] for m, own in found.items() if own}
    text = _table(found, mine[-1]["sizes"], mine[-1]["model"])
    measured = [row for row in rows if row["set"] == name and row["part"] == "measures"]
    measured = [row for row in measured if all(row[key] == mine[-1][key] for key in ("model", "sizes", "blocks"))]
    if measured:
        text += "\n" + "\n".join(levels_tables({row["method"]: row["measures"] for row in measured})) + "\n"
    (folder / f"{name}-table.md").write_text(text)
    series = {method: own for method, own in found.items() if method in DRAWN}
    lines = []
    for color, (method, own) in enumerate(series.items()):
        mean = _mean_of([row["seen"] for row in own])
        lines.append(Series(method, list(range(1, len(mean) + 1)), mean, color))
    if lines:
        chart = line_chart(lines, x_label="tasks learned", y_label="accuracy over all classes seen")
        (folder / f"{name}-accuracy.svg").write_text(chart)
    panels = {
        method: [_mean_of([row["matrix"][i] for row in own]) for i in range(len(own[0]["matrix"]))]
        for method, own in found.items()
        if len(own[0]["matrix"]) > 1
    }
    if panels:
        chart = matrix_chart(panels, x_label="asked about task", y_label="after task")
        (folder / f"{name}-matrix.svg").write_text(chart)


def _table(found: dict[str, list[Row]], sizes: dict[str, int], model: str) -> str:
    lines = [
        f"{model}; {sizes['classes']} classes a task, {sizes['per_class']} training and {sizes['test_per_class']} test "
        "texts a class; mean over the seeds (standard deviation); seconds on the machine that is named first.",
        "",
        "| method | texts kept | settings | seeds | final accuracy | average over tasks | forgetting | seconds a run "
        "| machine, float32 products |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, own in sorted(found.items(), key=lambda item: -statistics.mean(r["final"] for r in item[1])):
        final = [row["final"] for row in own]
        spread = f" ({100 * statistics.stdev(final):.1f})" if len(final) > 1 else ""
        average, forgetting = (statistics.mean(r[k] for r in own) for k in ("average", "forgetting"))
        machines = list(dict.fromkeys(r["hardware"] for r in own))
        seconds = statistics.mean(r["seconds"] for r in own if r["hardware"] == machines[0])
        settings = ", ".join(f"{key} {value:g}" for key, value in own[0]["options"].items())
        lines.append(
            f"| `{method}` | {METHODS[method].kept} | {settings} | {len(own)} "
            f"| {100 * statistics.mean(final):.1f}%{spread} | {100 * average:.1f}% "
            f"| {100 * forgetting:.1f}% | {seconds:.0f} | {'; '.join(machines)} |"
        )
    return "\n".join(lines) + "\n"


def _mean_of(rows: list[list[float | None]]) -> list[float]:
    """Column by column; a field that is blank in one is blank."""
    columns = zip(*rows, strict=True)
    return [math.nan if None in column else statistics.mean(x for x in column if x is not None) for column in columns]
