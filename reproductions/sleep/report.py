"""The table of what is known before and after."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row

ARMS = ("studied", "sleep", "without dreams", "dreams alone", "replay", "study of all")


def make_report(rows: Sequence[Row]) -> Report:
    """Accuracies by kind of question, over all studies, and of the first study alone; what it costs.

    Args:
        rows: in whatever number.
    """
    lines, costs = [], []
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        if not own:
            continue
        kinds = [kind for kind in own[0]["worlds"][0] if kind != "all"]
        cells = [_told([statistics.mean(world[kind] for world in row["worlds"]) for row in own]) for kind in kinds]
        losses = [_told([row["losses"][name] for row in own], 3) for name in own[0]["losses"]]
        first = _told([row["worlds"][0]["question"] for row in own])
        lines.append([arm, *cells, first, *losses])
        if "steps" in own[0]:
            kept = [1 - row["after"] / row["cleared"] for row in own]
            dreams = [row["dreams"][0] / row["dreams"][1] for row in own if row["dreams"][1]]
            numbers = [_told([row[name] for row in own], 0) for name in ("steps", "tokens", "seconds")]
            costs.append([arm, *numbers, _told(kept), _told(dreams) if dreams else ""])
        else:
            costs.append([arm, "", "", "", "", ""])
        costs[-1].append(_told([row["bytes"] / 1e6 for row in own], 1))
    if not lines:
        return Report({"results": EMPTY, "costs": EMPTY})
    some = next(row for row in rows if row["arm"] == lines[0][0])
    names = [kind for kind in some["worlds"][0] if kind != "all"]
    head = ["arm", *names, "question, first study", *(f"{name}, nats" for name in some["losses"])]
    costly = ["arm", "steps", "tokens", "seconds", "share of the divergence kept", "dreams kept", "MB"]
    return Report({"results": table(head, lines), "costs": table(costly, costs)})


def _told(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the lowest and highest."""
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
