"""Learning rates by a grid that goes on by factors of two, and seeds at the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from reproductions.harness.grid import best_rate, grow_rate, times
from reproductions.harness.report import table
from reproductions.harness.rows import Row, Rows

SEEDS = (0, 1, 2)
Train = Callable[[str, float, int], Row]
"""`train(name, rate, seed)` gives a row with `validation` (lower is better) and `diverged`."""


def tune(rows: Rows, train: Train, names: Mapping[str, float], seeds: Sequence[int]) -> None:
    """For every name seed 0 at half, once and twice its start, then on until the best is inside; all seeds there."""

    def get(name: str, rate: float, seed: int) -> Row:
        def run() -> Row:
            row = train(name, rate, seed)
            print(f"{name:30} lr {rate:.3g} seed {seed}: validation {row['validation']:.4f}", flush=True)
            return row

        return rows.get({"optimizer": name, "rate": rate, "seed": seed}, run)

    for name, start in names.items():
        rates = [float(f"{start * factor:.6g}") for factor in (0.5, 1.0, 2.0)]
        grid = grow_rate(lambda rate, n=name: quality(get(n, rate, SEEDS[0])), rates, times(2.0))  # type: ignore[misc]
        for seed in seeds:
            get(name, best_rate(grid), seed)


def quality(row: Row) -> float:
    """Validation loss, infinite if the run diverged."""
    return math.inf if row["diverged"] else float(row["validation"])


def grids(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[Row]]:
    """Rows of seed 0 by rate, of every name that has some."""
    found = {n: [r for r in rows if (r["optimizer"], r["seed"]) == (n, SEEDS[0])] for n in names}
    return {n: sorted(own, key=lambda row: row["rate"]) for n, own in found.items() if own}


def chosen(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[Row]]:
    """Of every name the rows at its best rate, by seed."""
    best = {n: min(own, key=quality)["rate"] for n, own in grids(rows, names).items()}
    found = {n: [r for r in rows if (r["optimizer"], r["rate"]) == (n, rate)] for n, rate in best.items()}
    return {n: sorted(own, key=lambda row: row["seed"]) for n, own in found.items()}


def grid_table(found: Mapping[str, Sequence[Row]]) -> str:
    """Validation loss of seed 0 by learning rate."""
    lines = [
        [f"`{name}`", ", ".join(f"{r['rate']:.3g}: {r['validation']:.4f}" for r in rows)]
        for name, rows in found.items()
    ]
    return table(["run (seed 0)", "validation loss by lr"], lines)
