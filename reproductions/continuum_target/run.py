"""Which target should a continuum level learn in context? hope_attention, about 2.4M parameters, periods 16, 64, never.

    python -m reproductions continuum_target --train BOOK... --valid BOOK [--tokens 200000] [--jobs 2]

Two seeds for each target and for no updates, at one learning rate. Validation losses in nats per byte are appended to
results.jsonl beside this file; what is there is skipped.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reproductions.harness.result_file import ResultFile, Row
from reproductions.small_lm import run as small_lm

RATE = 3e-3
CASES: list[tuple[str, dict[str, Any], int]] = [
    *((t, {"target": t, "periods": [16, 64, None]}, s) for s in (0, 1) for t in ("next", "value", "reconstruction")),
    *(("no updates", {"periods": [None]}, s) for s in (0, 1)),
]


def main() -> None:
    """Train every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/continuum_target"))
    args = parser.parse_args()
    results = ResultFile(Path(__file__).parent / "results.jsonl")
    data, valid = (small_lm.prepare(books, args.work / "books") for books in (args.train, [args.valid]))

    def run(case: tuple[str, dict[str, Any], int]) -> None:
        name, overrides, seed = case
        out = args.work / f"{name.replace(' ', '-')}-{seed}"

        def trained() -> Row:
            result = small_lm.train_once(out, args.tokens, data, valid, "hope_attention", RATE, seed, overrides)
            return {"loss": result["validation"]["loss"], "parameters": result["parameters"]}

        row = results.get({"target": name, "seed": seed, "tokens": args.tokens, "rate": RATE}, trained)
        print(f"{name:15} seed {seed}: {row['loss']:.4f}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, CASES))


if __name__ == "__main__":
    main()
