"""The table and the picture of finished readings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row

CHUNK = 128
"""Bytes of one gradient."""


def make_report(rows: Sequence[Row]) -> Report:
    """Losses while reading beside the updates that they took.

    Args:
        rows: in whatever number.
    """
    groups = by_arm(rows)
    lines = []
    for (levels, when, value), own in groups.items():
        step = f"every {CHUNK * value:,.0f} bytes" if when == "clock" else f"ratio {value:g}"
        updates = statistics.mean(sum(row["updates"].values()) for row in own)
        periods = {name: statistics.mean(row["periods"][name] for row in own) for name in own[0]["periods"]}
        found = ", ".join(f"{period:,.0f}" for period in periods.values())
        gain = [row["loss"] - row["frozen"] for row in own]
        cells = [levels, step, f"{own[0]['rate']:g}", f"{updates:,.0f}", found, _told([row["loss"] for row in own])]
        lines.append([*cells, _told(gain), _told([row["other"] for row in own])])
    names = ["levels", "they step", "rate", "updates", "bytes between two", "loss while reading"]
    return Report({"results": table([*names, "against frozen", "other book after"], lines) if lines else EMPTY})


def by_arm(rows: Sequence[Row]) -> dict[tuple[str, str, float], list[Row]]:
    """The reported readings of every arm, by seed: those that read most."""
    tested = [row for row in rows if row["part"] == "test"]
    most = max((row["read"] for row in tested), default=0)
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in sorted(tested, key=lambda r: (r["levels"], r["when"], r["value"], r["seed"])):
        if row["read"] == most:
            groups.setdefault((row["levels"], row["when"], row["value"]), []).append(row)
    return groups


def _told(values: Sequence[float]) -> str:
    """Mean, and the lowest and highest."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
