"""The tables of finished trainings: equal tokens, equal time, and the grids of learning rates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from reproductions.harness.grid import best_rate
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row

LOSSES = ["lr", "validation, mean of 3 (min to max)", "test, mean of 3 (min to max)"]


def make_report(rows: Sequence[Row], presets: Sequence[str]) -> Report:
    """Parts `results` (equal tokens), `time` and `grid`.

    A training is named by its tokens. Rows of the part `speed` say how many are a preset's share of a time; trainings
    of a number of tokens that is no share stand with all others of that number.

    Args:
        rows: in whatever number.
        presets: in the order of the tables.
    """
    speeds = [row for row in rows if row["part"] == "speed"]
    judged = [row for row in rows if row["part"] != "speed"]
    shares = {(row["preset"], row["tokens"]) for row in speeds if row["tokens"] != row["reference_tokens"]}
    equal = [row for row in judged if (row["preset"], row["tokens"]) not in shares]
    budgets = sorted({row["tokens"] for row in equal})
    parts = {
        "results": [_tokens([r for r in equal if r["tokens"] == n], presets, n, len(budgets) > 1) for n in budgets],
        "time": [
            _time([row for row in speeds if (row["reference"], row["reference_tokens"]) == pair], judged, presets)
            for pair in sorted({(row["reference"], row["reference_tokens"]) for row in speeds})
        ],
        "grid": [
            _grid([r for r in judged if r["tokens"] == n], presets) for n in sorted({r["tokens"] for r in judged})
        ],
    }
    return Report({name: "\n\n".join(filter(None, tables)) or EMPTY for name, tables in parts.items()})


def _tokens(rows: Sequence[Row], presets: Sequence[str], tokens: int, several: bool) -> str:
    lines = []
    for preset in presets:
        own = [row for row in rows if row["preset"] == preset]
        if own:
            parameters = next(row["parameters"] for row in own if "parameters" in row)
            lines.append([preset, f"{parameters:,}", *_losses(own)])
    text = table(["preset", "parameters", *LOSSES], lines)
    return f"{tokens:,} bytes:\n\n{text}" if several else text


def _time(speeds: Sequence[Row], rows: Sequence[Row], presets: Sequence[str]) -> str:
    """Of one reference and its tokens."""
    lines = []
    for preset in presets:
        speed = next((row for row in speeds if row["preset"] == preset), None)
        if speed is not None:
            own = [row for row in rows if (row["preset"], row["tokens"]) == (preset, speed["tokens"])]
            losses = _losses(own) if own else ["", "", ""]
            lines.append([preset, f"{speed['step_ms']:.0f}", f"{speed['tokens']:,}", *losses])
    return table(["preset", "ms a step", "bytes read", *LOSSES], lines)


def _losses(rows: Sequence[Row]) -> list[str]:
    """Rate and losses of one preset after one number of tokens: at the rate that read the test book, else the best."""
    tested = {row["rate"] for row in rows if row["part"] == "test"}
    grid = {row["rate"]: row["loss"] for row in rows if row["part"] == "validation" and row["rate"] in tested}
    grid = grid or {row["rate"]: row["loss"] for row in rows if row["part"] == "validation"}
    rate = best_rate(grid)
    own = [row for row in rows if row["rate"] == rate]
    return [f"{rate:g}", *(_told([row["loss"] for row in own if row["part"] == p]) for p in ("validation", "test"))]


def _grid(rows: Sequence[Row], presets: Sequence[str]) -> str:
    """Seed 0 at every rate, where there are several; rows of one number of tokens."""
    judged = [row for row in rows if row["part"] == "validation" and row["seed"] == 0]
    grids = {preset: {row["rate"]: row["loss"] for row in judged if row["preset"] == preset} for preset in presets}
    grids = {preset: grid for preset, grid in grids.items() if len(grid) > 1}
    if not grids:
        return ""
    rates = sorted({rate for grid in grids.values() for rate in grid})
    head = [f"preset (seed 0, validation, {rows[0]['tokens']:,} bytes)", *(f"lr {rate:g}" for rate in rates)]
    return table(head, [[p, *(f"{grid[r]:.4f}" if r in grid else "" for r in rates)] for p, grid in grids.items()])


def _told(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})" if values else ""
