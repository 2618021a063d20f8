"""Values that change: pairs, other values for the same keys in a later chunk, then every key asked for its last value.

Two layers of width 64, trained as in the recall reproduction, half of the steps on the easier task. The learning rate
of a preset is the one of the grid with the higher mean accuracy on validation sequences at seed 0, by whole trainings:
after a third of the steps some presets have found nothing yet at either rate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

from nestling import presets
from nestling.tasks.associative_recall import OverwriteTask
from reproductions.harness.command import Reproduction
from reproductions.harness.grid import best_rate, fixed, grow_rate
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row, Rows
from reproductions.mqar.run import (
    GRID,
    SEEDS,
    TEST_ROWS,
    TEST_SEED,
    VALIDATION_ROWS,
    VALIDATION_SEED,
    accuracy,
    build,
    chosen,
    quality,
    train,
)
from reproductions.mqar.settings import VOCABULARY

BLOCK = 64  # the chunk of the presets that have one
TASKS = {f"{pairs} pairs": OverwriteTask(BLOCK, pairs, VOCABULARY) for pairs in (4, 16)}
PRESETS = ("transformer", "deltanet", "gated_deltanet", "hope_linear", "hope", "titans_lmm")


def measure(rows: Rows, preset: str, seed: int, rate: float, steps: int) -> Row:
    """One training, unless it is there already."""
    name = {"preset": preset, "seed": seed, "rate": rate, "steps": steps}
    return rows.get(name, lambda: _trained(name, VALIDATION_ROWS, TEST_ROWS))


def _trained(name: Row, validation_rows: int, test_rows: int) -> Row:
    start = time.perf_counter()
    model = build(name["preset"], name["seed"])
    train(model, name["rate"], name["steps"], name["seed"], tuple(TASKS.values()))
    row = {
        "validation": [accuracy(model, t, validation_rows, VALIDATION_SEED) for t in TASKS.values()],
        "test": [accuracy(model, t, test_rows, TEST_SEED) for t in TASKS.values()],
        "seconds": round(time.perf_counter() - start, 1),
    }
    shown = ", ".join(f"{value:.3f}" for value in row["test"])
    print(f"{name['preset']} seed {name['seed']} lr {name['rate']:g}: {shown} in {row['seconds']:.0f} s", flush=True)
    return row


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Rates, then all presets and seeds."""
    for preset in args.presets:

        def loss(rate: float, preset: str = preset) -> float:
            return -quality(measure(rows, preset, SEEDS[0], rate, args.steps))

        best = best_rate(grow_rate(loss, GRID, neighbour=fixed))
        for seed in args.seeds:
            measure(rows, preset, seed, best, args.steps)


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Two steps of one preset at one rate."""
    name = {"preset": args.presets[0], "seed": SEEDS[0], "rate": GRID[0], "steps": 2}
    rows.get(name, lambda: _trained(name, 64, 64))


def report(rows: Sequence[Row]) -> Report:
    """Of the longest trainings there are, at the best rate of each preset."""
    if not rows:
        return Report({"results": EMPTY})
    lines, whole = [], sorted(chosen(rows), key=lambda row: row["seed"])
    for preset in PRESETS:
        if own := [row for row in whole if row["preset"] == preset]:
            lines.append(
                [f"`{preset}`", f"{own[0]['rate']:g}", *(_told([r["test"][i] for r in own]) for i in range(len(TASKS)))]
            )
    return Report({"results": table(["preset", "learning rate", *TASKS], lines)})


def _told(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which trainings."""
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), choices=list(presets.PRESETS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=3000)


REPRODUCTION = Reproduction(run, report, quick, arguments)
