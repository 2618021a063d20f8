"""Hope, Hope-Attention and Transformer++ as small language models on the same tokens, each at its tuned rate.

About 2.4M parameters each, on books of Project Gutenberg, in bytes. Every preset starts from the same grid of learning
rates (seed 0), which doubles or halves on until the best rate is not at its edge. The rate with the lowest validation
loss then runs with two more seeds, and the test book is read once by those three runs. Models are kept in the folder
work of --folder.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reproductions.harness.command import Reproduction
from reproductions.harness.grid import best_rate, grow_rate, times
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row, Rows
from reproductions.small_lm import training

PRESETS = ("transformer", "hope_attention", "hope_linear", "hope")
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
SEEDS = (0, 1, 2)


class Experiment:
    """All runs.

    Args:
        args: of the command line.
        rows: where finished runs are.
    """

    def __init__(self, args: argparse.Namespace, rows: Rows) -> None:
        self.args, self.rows = args, rows
        self.data = training.books(args.train, args.folder)
        self.valid, self.test = training.books([args.valid, args.test], args.folder)

    def key(self, preset: str, rate: float, seed: int, book: str) -> dict[str, Any]:
        """What names a run."""
        step = training.LENGTH * training.BATCH
        key = {"preset": preset, "rate": rate, "seed": seed, "tokens": -(-self.args.tokens // step) * step}
        key |= {"length": training.LENGTH, "batch": training.BATCH}
        return key | {"train": [Path(path).name for path in self.data], "book": Path(book).name}

    def validation(self, preset: str, rate: float, seed: int) -> float:
        """Loss in nats per byte after a training."""

        def trained() -> Row:
            made = training.Training(preset, rate, seed, self.args.tokens, shape=self.args.shape)
            result = made.run(self.place(preset, rate, seed), self.data, [self.valid], apart=self.args.apart)
            print(f"{preset:15} lr {rate:g} seed {seed}: {result['validation']['loss']:.4f}", flush=True)
            return {"loss": result["validation"]["loss"], "parameters": result["parameters"]}

        key = {"part": "validation", **self.key(preset, rate, seed, self.valid)}
        return float(self.rows.get(key, trained)["loss"])

    def tested(self, preset: str, rate: float, seed: int) -> None:
        """The test book, read once."""
        place = self.place(preset, rate, seed)

        def read() -> Row:
            return {"loss": training.loss_on(place, self.test, self.args.test_tokens, apart=self.args.apart)}

        self.rows.get({"part": "test", **self.key(preset, rate, seed, self.test)}, read)

    def place(self, preset: str, rate: float, seed: int) -> Path:
        """Of a model."""
        return Path(self.args.folder / "work" / f"{preset}-lr{rate:g}-seed{seed}")

    def preset(self, preset: str) -> None:
        """Its grid, its seeds, its tests."""
        grid = grow_rate(lambda rate: self.validation(preset, rate, SEEDS[0]), self.args.rates, times(2.0))
        rate = best_rate(grid)
        for seed in self.args.seeds:
            self.validation(preset, rate, seed)
            self.tested(preset, rate, seed)


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Every preset, the slow ones first, so that the last to finish is a short one."""
    made = Experiment(args, rows)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(made.preset, reversed(args.presets)))


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """One preset at one rate, on a few bytes of invented text."""
    training.quicken(args)
    made = Experiment(args, rows)
    made.validation("transformer", 3e-3, 0)
    made.tested("transformer", 3e-3, 0)


def report(rows: Sequence[Row]) -> Report:
    """Mean and range over the seeds at the best rate, and the grid."""
    judged = [row for row in rows if row["part"] == "validation"]
    grids = {p: {r["rate"]: r["loss"] for r in judged if (r["preset"], r["seed"]) == (p, SEEDS[0])} for p in PRESETS}
    grids = {preset: grid for preset, grid in grids.items() if grid}
    if not grids:
        return Report({"results": EMPTY, "grid": EMPTY})
    lines = []
    for preset, grid in grids.items():
        own = [row for row in rows if (row["preset"], row["rate"]) == (preset, best_rate(grid))]
        losses = [[row["loss"] for row in own if row["part"] == part] for part in ("validation", "test")]
        parameters = next(row["parameters"] for row in own if "parameters" in row)
        lines.append([preset, f"{parameters:,}", f"{best_rate(grid):g}", *map(_told, losses)])
    head = ["preset", "parameters", "lr", "validation, mean of 3 (min to max)", "test, mean of 3 (min to max)"]
    rates = sorted({rate for grid in grids.values() for rate in grid})
    shown = [[p, *(f"{grid[r]:.4f}" if r in grid else "" for r in rates)] for p, grid in grids.items()]
    grid_head = ["preset (seed 0, validation)", *(f"lr {rate:g}" for rate in rates)]
    return Report({"results": table(head, lines), "grid": table(grid_head, shown)})


def _told(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})" if values else ""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Books, presets, rates, seeds."""
    training.arguments(parser)
    parser.add_argument("--valid", type=Path, help="the book that rates are chosen on")
    parser.add_argument("--test", type=Path, help="the book that is read once")
    parser.add_argument("--test-tokens", type=int, default=32_768)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES), help="that the grid begins with")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))


REPRODUCTION = Reproduction(run, report, quick, arguments)
