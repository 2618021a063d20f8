"""A grid of learning rates that grows until the best is inside, and seeds at the best; finished runs stay on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from reproductions.harness.result_file import ResultFile, Row

SEEDS = (0, 1, 2)


class Runs:
    """Finished runs, a line each.

    Args:
        path: where they are kept.
        train: `train(name, rate, seed)` gives the row of a run, with `validation` (lower is better) and `diverged`.
    """

    def __init__(self, path: Path, train: Callable[[str, float, int], Row]) -> None:
        self.results, self.train = ResultFile(path), train

    def get(self, name: str, rate: float, seed: int) -> Row:
        """The run, trained now unless it is there."""
        rate = float(f"{rate:.6g}")

        def run() -> Row:
            row = self.train(name, rate, seed)
            print(f"{name:30} lr {rate:.3g} seed {seed}: validation {row['validation']:.4f}", flush=True)
            return row

        return self.results.get({"optimizer": name, "rate": rate, "seed": seed}, run)

    def tune(self, name: str, start: float) -> list[Row]:
        """Seed 0 at every rate tried, by rate: half, once and twice `start`, then on by factors of two."""
        found = [self.get(name, start * factor, SEEDS[0]) for factor in (0.5, 1.0, 2.0)]
        while (best := min(found, key=quality)) in (found[0], found[-1]):
            up = best is found[-1]
            more = self.get(name, best["rate"] * (2.0 if up else 0.5), SEEDS[0])
            found = [*found, more] if up else [more, *found]
        return found

    def seeds(self, grid: list[Row]) -> list[Row]:
        """All seeds at the best rate of a grid."""
        best = min(grid, key=quality)
        return [self.get(best["optimizer"], best["rate"], seed) for seed in SEEDS]


def quality(row: Row) -> float:
    """Validation loss, infinite if the run diverged."""
    return float("inf") if row["diverged"] else float(row["validation"])


def grid_table(grids: dict[str, list[Row]]) -> list[str]:
    """Markdown: validation loss of seed 0 by learning rate."""
    lines = ["| run (seed 0) | validation loss by lr |", "| --- | --- |"]
    for name, rows in grids.items():
        lines.append(f"| `{name}` | " + ", ".join(f"{r['rate']:.3g}: {r['validation']:.4f}" for r in rows) + " |")
    return lines
