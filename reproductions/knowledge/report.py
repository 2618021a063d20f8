"""Tables of what was known."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from nestling.tasks.knowledge import KINDS
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row

TOLD = [kind for kind in KINDS if kind != "absence"]


def make_report(rows: Sequence[Row]) -> Report:
    """The invented world: what is known, and what it costs; and the real texts."""
    world = _by_arm([row for row in rows if row["source"] == "world"])
    real = _by_arm([row for row in rows if row["source"] != "world"])
    if not rows:
        return Report({"results": EMPTY, "costs": EMPTY, "words": EMPTY, "real": EMPTY})
    kinds = list(dict.fromkeys(kind for own in real.values() for row in own for kind in row["kinds"] if kind != "all"))
    return Report(
        {
            "results": _table(
                "arm",
                world,
                {kind: _of(kind, "accuracy") for kind in TOLD}
                | {"absence, AUROC": lambda row: row["absence_auroc"], "another user's": lambda row: row["other user"]},
            ),
            "costs": _table(
                "arm",
                world,
                {
                    "seconds": lambda row: row["seconds"],
                    "MB": lambda row: row["bytes"] / 1e6,
                    "WikiText, nats": lambda row: row.get("wikitext"),
                    "LAMBADA, accuracy": lambda row: row.get("lambada", {}).get("accuracy"),
                    "documents, mean nats": lambda row: row["mean_loss"],
                    "median": lambda row: row["median_loss"],
                },
                3,
            ),
            "words": _table(
                "arm",
                world,
                {kind: _of(kind, "said") for kind in ("question", "two hops", "update", "absence")}
                | {f"{kind}, rank of 10": _of(kind, "rank") for kind in ("question", "reversed")},
            ),
            "real": _table("arm", real, {kind: _of(kind, "accuracy") for kind in kinds}) if real else EMPTY,
        }
    )


def _of(kind: str, what: str) -> Callable[[Row], float | None]:
    return lambda row: row["kinds"].get(kind, {}).get(what)


def _by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["arm"] + (", chat" if row["chat"] else ""), []).append(row)
    return found


def _table(
    first: str, arms: dict[str, list[Row]], columns: dict[str, Callable[[Row], float | None]], digits: int = 2
) -> str:
    lines = [
        [arm, *(_cell([column(row) for row in rows], digits) for column in columns.values())]
        for arm, rows in arms.items()
    ]
    return table([first, *columns], lines) if lines else EMPTY


def _cell(values: Sequence[float | None], digits: int) -> str:
    """The mean of the seeds, and their range where there are several."""
    known = [value for value in values if value is not None and value == value]
    if not known:
        return ""
    mean = f"{statistics.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.{digits}f} to {max(known):.{digits}f})"
