"""The tables and the pictures of finished runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from nestling.plotting.curves import Series, line_chart
from nestling.plotting.matrix import matrix_chart
from reproductions.figure6.methods import METHODS
from reproductions.harness.level_records import levels_tables
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row

SETS = ("clinc150", "dbpedia70")
"""Those whose tables stand in RESULTS.md."""
DRAWN = ("levels_memory", "memory", "external_learner", "replay_large", "lora", "fine_tuning")


def make_report(rows: Sequence[Row]) -> Report:
    """`results`, the final accuracies of all sets side by side; of every set `SET` and `SET-levels`, the whole table
    and the levels' measures, and the pictures `SET-accuracy.svg` and `SET-matrix.svg`."""
    parts: dict[str, str] = {}
    pictures: dict[str, Callable[[], str]] = {}
    finals: dict[str, dict[str, list[Row]]] = {}
    for name in dict.fromkeys([*SETS, *(row["set"] for row in rows)]):
        found, measured = _newest([row for row in rows if row["set"] == name])
        if not found:
            if name in SETS:
                parts |= {name: EMPTY, f"{name}-levels": EMPTY}
            continue
        finals[name], drawn = found, _pictures(found, name)
        links = {"accuracy": "accuracy over all classes seen", "matrix": "accuracy on every task after every task"}
        shown = [f"![{text}]({name}-{kind}.svg)" for kind, text in links.items() if f"{name}-{kind}.svg" in drawn]
        parts[name] = "\n\n".join([_table(found), *shown])
        records = {row["method"]: row["measures"] for row in measured}
        parts[f"{name}-levels"] = "\n".join(levels_tables(records))
        pictures |= drawn
    return Report({"results": _finals(finals) if finals else EMPTY} | parts, pictures)


def _finals(found: dict[str, dict[str, list[Row]]]) -> str:
    """A column for every set, by the accuracy on the first; the picture of that one."""
    first = next(iter(found))
    methods = dict.fromkeys(m for own in found.values() for m, _ in _by_accuracy(own))
    lines = []
    for method in methods:
        cells = [_final(own[method]) if method in own else "" for own in found.values()]
        lines.append([f"`{method}`", METHODS[method].kept, *cells])
    text = table(["method", "texts kept", *(f"{name}, final accuracy" for name in found)], lines)
    rows = next(iter(found[first].values()))
    picture = (
        f"\n\n![accuracy over all classes seen, {first}]({first}-accuracy.svg)" if len(rows[0]["seen"]) > 1 else ""
    )
    return text + picture


def _final(rows: list[Row]) -> str:
    """Mean and standard deviation over the seeds."""
    final = [row["final"] for row in rows]
    spread = f" ({100 * statistics.stdev(final):.1f})" if len(final) > 1 else ""
    return f"{100 * statistics.mean(final):.1f}%{spread}"


def _newest(rows: Sequence[Row]) -> tuple[dict[str, list[Row]], list[Row]]:
    """Test rows by method with the newest row's sizes, and rows of the levels' measures.

    Of a method, the rows with its newest settings: a grid that has grown may have changed the choice.
    """
    mine = [row for row in rows if row["part"] == "test" and not row["diverged"]]
    if not mine:
        return {}, []
    keys = ("model", "sizes", "layers", "blocks", "greedy", "max_tokens")
    mine = [row for row in mine if all(row[key] == mine[-1][key] for key in keys)]
    found = {method: [row for row in mine if row["method"] == method] for method in METHODS}
    found = {m: [row for row in own if row["options"] == own[-1]["options"]] for m, own in found.items() if own}
    measured = [row for row in rows if row["part"] == "measures"]
    return found, [row for row in measured if all(row[key] == mine[-1][key] for key in ("model", "sizes", "blocks"))]


def _pictures(found: dict[str, list[Row]], name: str) -> dict[str, Callable[[], str]]:
    pictures: dict[str, Callable[[], str]] = {}
    lines = []
    for color, (method, own) in enumerate((m, own) for m, own in found.items() if m in DRAWN):
        mean = _mean_of([row["seen"] for row in own])
        lines.append(Series(method, list(range(1, len(mean) + 1)), mean, color))
    lines.sort(key=lambda line: -line.y[-1])
    if lines and len(lines[0].x) > 1:
        labels = {"x_label": "tasks learned", "y_label": "accuracy over all classes seen"}
        pictures[f"{name}-accuracy.svg"] = lambda: line_chart(lines, **labels)
    panels = {
        method: [_mean_of([row["matrix"][i] for row in own]) for i in range(len(own[0]["matrix"]))]
        for method, own in _by_accuracy(found)
        if len(own[0]["matrix"]) > 1
    }
    if panels:
        axes = {"x_label": "asked about task", "y_label": "after task"}
        pictures[f"{name}-matrix.svg"] = lambda: matrix_chart(panels, **axes)
    return pictures


def _by_accuracy(found: dict[str, list[Row]]) -> list[tuple[str, list[Row]]]:
    return sorted(found.items(), key=lambda item: -statistics.mean(r["final"] for r in item[1]))


def _table(found: dict[str, list[Row]]) -> str:
    first = next(iter(found.values()))[0]
    sizes = first["sizes"]
    lines = []
    for method, own in _by_accuracy(found):
        average, forgetting = (statistics.mean(r[k] for r in own) for k in ("average", "forgetting"))
        machines = list(dict.fromkeys(r["hardware"] for r in own))
        seconds = statistics.mean(r["seconds"] for r in own if r["hardware"] == machines[0])
        settings = ", ".join(f"{key} {value:g}" for key, value in own[0]["options"].items())
        cells = [f"`{method}`", METHODS[method].kept, settings, str(len(own))]
        cells += [_final(own), f"{100 * average:.1f}%", f"{100 * forgetting:.1f}%"]
        lines.append([*cells, f"{seconds:.0f}", "; ".join(machines)])
    head = ["method", "texts kept", "settings", "seeds", "final accuracy", "average over tasks", "forgetting"]
    head += ["seconds a run", "machine, float32 products"]
    told = (
        f"{first['model']}; {sizes['classes']} classes a task, {sizes['per_class']} training and "
        f"{sizes['test_per_class']} test texts a class. Mean over the seeds (standard deviation); seconds on the "
        "machine that is named first."
    )
    return f"{told}\n\n{table(head, lines)}"


def _mean_of(rows: list[list[float | None]]) -> list[float]:
    """Column by column; a field that is blank in one is blank."""
    columns = zip(*rows, strict=True)
    return [math.nan if None in column else statistics.mean(x for x in column if x is not None) for column in columns]
