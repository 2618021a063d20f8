"""Hope, Hope-Attention and Transformer++ as small language models on the same text, each at its tuned rate.

About 2.4M parameters each, on books of Project Gutenberg, in bytes. Every preset starts from the same grid of learning
rates (seed 0), which doubles or halves on until the best rate is not at its edge. The rate with the lowest validation
loss then runs with two more seeds, and the test book is read once by those three runs. Models are kept in the folder
work of --folder.

--tokens says how much is read; with --tune-tokens the rates are chosen by shorter trainings. --equal-time PRESET gives
every model the time in place of the tokens: as many as it reads while that preset reads --tokens. How fast each is, is
measured first, in turns on this machine.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reproductions.harness.command import Reproduction
from reproductions.harness.grid import best_rate, grow_rate, times
from reproductions.harness.report import Report
from reproductions.harness.rows import Row, Rows
from reproductions.small_lm import training
from reproductions.small_lm.report import make_report
from reproductions.small_lm.speed import shares

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

    def key(self, preset: str, rate: float, seed: int, tokens: int, book: str) -> dict[str, Any]:
        """What names a run."""
        key = {"preset": preset, "rate": rate, "seed": seed, "tokens": tokens}
        key |= {"length": training.LENGTH, "batch": training.BATCH}
        return key | {"train": [Path(path).name for path in self.data], "book": Path(book).name}

    def validation(self, preset: str, rate: float, seed: int, tokens: int) -> float:
        """Loss in nats per byte after a training."""

        def trained() -> Row:
            made = training.Training(preset, rate, seed, tokens, shape=self.args.shape)
            result = made.run(self.place(preset, rate, seed, tokens), self.data, [self.valid], apart=self.args.apart)
            loss, seconds = result["validation"]["loss"], round(result["seconds"], 1)
            print(f"{preset:15} lr {rate:g} seed {seed}, {tokens:,} bytes: {loss:.4f} in {seconds:.0f} s", flush=True)
            return {"loss": loss, "parameters": result["parameters"], "seconds": seconds}

        key = {"part": "validation", **self.key(preset, rate, seed, tokens, self.valid)}
        return float(self.rows.get(key, trained)["loss"])

    def tested(self, preset: str, rate: float, seed: int, tokens: int) -> None:
        """The test book, read once."""
        place = self.place(preset, rate, seed, tokens)

        def read() -> Row:
            return {"loss": training.loss_on(place, self.test, self.args.test_tokens, apart=self.args.apart)}

        self.rows.get({"part": "test", **self.key(preset, rate, seed, tokens, self.test)}, read)

    def place(self, preset: str, rate: float, seed: int, tokens: int) -> Path:
        """Of a model."""
        return Path(self.args.folder / "work" / f"{preset}-lr{rate:g}-seed{seed}-{tokens}")

    def budgets(self) -> dict[str, int]:
        """Tokens of every preset: the same, or what it reads in the time in which one of them reads those."""
        reference, tokens = self.args.equal_time, whole(self.args.tokens)
        if reference is None:
            return dict.fromkeys(self.args.presets, tokens)
        key = {"part": "speed", "reference": reference, "reference_tokens": tokens}
        missing = [preset for preset in self.args.presets if self.rows.find(key | {"preset": preset}) is None]
        found = shares(missing, reference, self.args.shape, self.args.rounds) if missing else {}
        for preset in missing:
            row = found[preset] | {"tokens": whole(tokens * found[preset]["share"])}
            self.rows.get(key | {"preset": preset}, lambda row=row: row)
        rows = {preset: self.rows.find(key | {"preset": preset}) for preset in self.args.presets}
        return {preset: row["tokens"] for preset, row in rows.items() if row is not None}

    def preset(self, preset: str, tokens: int) -> None:
        """Its grid, its seeds, its tests."""
        tuned = tokens if self.args.tune_tokens is None else whole(self.args.tune_tokens)
        rates = self.args.rates
        if len(rates) > 1:
            grid = grow_rate(lambda rate: self.validation(preset, rate, SEEDS[0], tuned), rates, times(2.0))
            rates = [best_rate(grid)]
        for seed in self.args.seeds:
            self.validation(preset, rates[0], seed, tokens)
            self.tested(preset, rates[0], seed, tokens)


def whole(tokens: float) -> int:
    """So many tokens in whole steps."""
    step = training.LENGTH * training.BATCH
    return max(1, math.ceil(tokens / step)) * step


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Every preset, the slow ones first, so that the last to finish is a short one."""
    made = Experiment(args, rows)
    budgets = made.budgets()
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda preset: made.preset(preset, budgets[preset]), reversed(args.presets)))


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Two presets at one rate at equal time, on a few bytes of invented text."""
    training.quicken(args)
    args.presets, args.equal_time, args.rounds = ["transformer", "hope_linear"], "transformer", 1
    made = Experiment(args, rows)
    for preset, tokens in made.budgets().items():
        made.validation(preset, 3e-3, 0, tokens)
        made.tested(preset, 3e-3, 0, tokens)


def report(rows: Sequence[Row]) -> Report:
    """Mean and range over the seeds at the best rate, for equal tokens and for equal time, and the grids."""
    return make_report(rows, PRESETS)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Books, presets, rates, seeds."""
    training.arguments(parser)
    parser.add_argument("--valid", type=Path, help="the book that rates are chosen on")
    parser.add_argument("--test", type=Path, help="the book that is read once")
    parser.add_argument("--test-tokens", type=int, default=32_768)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="that the grid begins with")
    parser.add_argument("--tune-tokens", type=int, help="of the trainings that choose the rate (default: --tokens)")
    parser.add_argument(
        "--equal-time", choices=PRESETS, metavar="PRESET", help="the time it takes for --tokens, to all"
    )
    parser.add_argument("--rounds", type=int, default=20, help="steps that a speed is measured with")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))


REPRODUCTION = Reproduction(run, report, quick, arguments)
