"""Which target should a continuum level learn in context? hope_attention, about 2.4M parameters, periods 16, 64, never.

Two seeds for each target and for no updates, at one learning rate, on books of Project Gutenberg; validation losses in
nats per byte. `--train`, `--valid` and `--jobs` as in small_lm.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reproductions.harness.command import Reproduction
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row, Rows
from reproductions.small_lm import training

RATE = 3e-3
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "value": (
        "a learned projection of the token itself (Titans)",
        {"target": "value", "periods": [16, 64, None]},
    ),
    "next": (
        "a learned projection of the next token, keys shifted by one (after In-Place TTT)",
        {"target": "next", "periods": [16, 64, None]},
    ),
    "reconstruction": (
        "the level's own input (TTT)",
        {"target": "reconstruction", "periods": [16, 64, None]},
    ),
    "no updates": ("one plain MLP with the same parameters in all", {"periods": [None]}),
}
"""What each is, and the overrides that make it."""


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Train every target and seed that is asked for."""
    data, valid = training.books(args.train, args.folder), training.books([args.valid], args.folder)

    def one(target: str, seed: int) -> None:
        made = training.Training(
            "hope_attention", RATE, seed, args.tokens, overrides=TARGETS[target][1], shape=args.shape
        )

        def trained() -> Row:
            result = made.run(
                args.folder / "work" / f"{target.replace(' ', '-')}-{seed}", data, valid, apart=args.apart
            )
            return {"loss": result["validation"]["loss"], "parameters": result["parameters"]}

        row = rows.get({"target": target, "seed": seed, "tokens": args.tokens, "rate": RATE}, trained)
        print(f"{target:15} seed {seed}: {row['loss']:.4f}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda case: one(*case), [(t, s) for s in args.seeds for t in args.targets]))


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """One target, on a few bytes of invented text."""
    training.quicken(args)
    args.targets, args.seeds = ["value"], [0]
    run(args, rows)


def report(rows: Sequence[Row]) -> Report:
    """Loss of every target and seed."""
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for target, (meaning, _) in TARGETS.items():
        own = {row["seed"]: f"{row['loss']:.4f}" for row in rows if row["target"] == target}
        if own:
            lines.append([f"`{target}`: {meaning}", *(own.get(seed, "") for seed in seeds)])
    head = ["target", *(f"seed {seed}" for seed in seeds)]
    return Report({"results": table(head, lines) if lines else EMPTY})


def arguments(parser: argparse.ArgumentParser) -> None:
    """Books, targets, seeds."""
    training.arguments(parser)
    parser.add_argument("--valid", type=Path, help="the book that is judged")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.set_defaults(tokens=200_000)


REPRODUCTION = Reproduction(run, report, quick, arguments)
