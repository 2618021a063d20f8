"""Validation loss of hope, hope_linear, hope_attention and transformer, about 2.4M parameters each, on the same tokens.

    python -m reproductions small_lm --train BOOK... --valid BOOK --test BOOK [--tokens 400000] [--jobs 2]

Every preset starts from the same grid of learning rates (seed 0), which doubles or halves on until the best rate is not
at its edge. The rate with the lowest validation loss then runs with two more seeds, and the test book is read once by
those three runs. Finished runs are kept in --work, so the command may be interrupted and repeated. Writes results.json
and table.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PRESETS = ("transformer", "hope_attention", "hope_linear", "hope")
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
SEEDS = (0, 1, 2)
OVERRIDES = {"hidden_size": 192, "num_heads": 3}
LENGTH, BATCH = 512, 2  # few rows: at this budget every preset gains more from steps than from a steadier gradient
WORKER = """
import json, sys, torch
torch.set_num_threads(1)
from nestling.training import TrainConfig, train
print(json.dumps(train(TrainConfig(**json.loads(sys.argv[1]))).seconds))
"""
TESTER = """
import json, sys, torch
torch.set_num_threads(1)
import nestling
from transformers import AutoModelForCausalLM, AutoTokenizer
from nestling.evaluation.language import evaluate_loss
from nestling.training.tokenization import encode_text
run, book, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
ids = encode_text(AutoTokenizer.from_pretrained(run), open(book, encoding="utf-8").read())[:limit]
model = AutoModelForCausalLM.from_pretrained(run).eval()
print(json.dumps(evaluate_loss(model, ids, int(sys.argv[4]), carry=False).loss))
"""


def strip_gutenberg(text: str) -> str:
    """The book between the header and the footer of Project Gutenberg."""
    body = re.split(r"\*\*\* ?START OF TH[^\n]*\n", text, maxsplit=1)[-1]
    return re.split(r"\*\*\* ?END OF TH", body, maxsplit=1)[0].strip() + "\n"


def prepare(books: list[Path], folder: Path) -> list[str]:
    """Stripped copies of the books; bytes that are not UTF-8 (one book has some) become replacement characters."""
    folder.mkdir(parents=True, exist_ok=True)
    for book in books:
        (folder / book.name).write_text(
            strip_gutenberg(book.read_text(encoding="utf-8-sig", errors="replace")), encoding="utf-8"
        )
    return [str(folder / book.name) for book in books]


def call(code: str, *arguments: str) -> float:
    """The number a worker process prints last."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"a run failed:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def train_once(
    out: Path,
    tokens: int,
    data: list[str],
    valid: list[str],
    preset: str,
    rate: float,
    seed: int,
    overrides: dict[str, Any],
) -> dict[str, Any]:
    """The result of a run, trained now unless it is finished."""
    if not (out / "result.json").exists():
        config = {
            "out": str(out), "preset": preset, "overrides": OVERRIDES | overrides, "data": data, "valid": valid,
            "tokens": tokens, "sequence_length": LENGTH, "batch_size": BATCH, "learning_rate": rate, "seed": seed,
            "eval_every": 10**6, "save_every": 10**6, "sample_tokens": 0, "tensorboard": False,
        }  # fmt: skip
        call(WORKER, json.dumps(config))
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def run_one(
    args: argparse.Namespace, data: list[str], valid: list[str], preset: str, rate: float, seed: int
) -> dict[str, Any]:
    """Settings and validation loss, in nats per byte, of one run."""
    out = args.work / f"{preset}-lr{rate:g}-seed{seed}"
    result = train_once(out, args.tokens, data, valid, preset, rate, seed, {})
    loss = result["validation"]["loss"]
    print(f"{preset:15} lr {rate:g} seed {seed}: validation {loss:.4f}", flush=True)
    return {"run": str(out), "preset": preset, "rate": rate, "seed": seed, "validation": loss,
            "parameters": result["parameters"], "tokens": result["tokens"]}  # fmt: skip


def best_rate(runs: list[dict[str, Any]], preset: str) -> float:
    """The rate with the lowest validation loss."""
    rate: float = min((r for r in runs if r["preset"] == preset), key=lambda r: r["validation"])["rate"]
    return rate


def beyond_edge(runs: list[dict[str, Any]], preset: str) -> float | None:
    """The next rate to try where the best one is the lowest or the highest so far, else None."""
    rates = sorted(r["rate"] for r in runs if r["preset"] == preset)
    best = best_rate(runs, preset)
    return best / 2 if best == rates[0] else best * 2 if best == rates[-1] else None


def main() -> None:
    """Grid, seeds, test, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--test-tokens", type=int, default=32_768)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/small_lm"))
    args = parser.parse_args()
    data = prepare(args.train, args.work / "books")
    valid, test = prepare([args.valid, args.test], args.work / "books")

    with ThreadPoolExecutor(args.jobs) as pool:
        # The slow presets first, so that the last to finish is a short one.
        todo = [(p, r, SEEDS[0]) for p in reversed(PRESETS) for r in RATES]
        runs: list[dict[str, Any]] = []
        while todo:
            runs += pool.map(lambda job: run_one(args, data, [valid], *job), todo)
            todo = [(p, rate, SEEDS[0]) for p in reversed(PRESETS) if (rate := beyond_edge(runs, p))]
        best = {p: best_rate(runs, p) for p in PRESETS}
        more = [(p, best[p], s) for p in reversed(PRESETS) for s in SEEDS[1:]]
        runs += pool.map(lambda job: run_one(args, data, [valid], *job), more)
        chosen = [r for r in runs if r["rate"] == best[r["preset"]]]
        for run, loss in zip(
            chosen,
            pool.map(lambda r: call(TESTER, r["run"], test, str(args.test_tokens), str(LENGTH)), chosen),
            strict=True,
        ):
            run["test"] = loss
    for run in runs:
        run["run"] = Path(run["run"]).name
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "commit": commit, "machine": platform.machine(), "threads": 1, "sequence_length": LENGTH, "batch_size": BATCH,
        "train": [b.name for b in args.train], "valid": args.valid.name, "test": args.test.name,
        "best": best, "runs": runs,
    }  # fmt: skip
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "table.md").write_text(table(runs, best))
    print(table(runs, best))


def table(runs: list[dict[str, Any]], best: dict[str, float]) -> str:
    """Markdown: mean and range over the seeds at the best rate, and the grid."""
    lines = [
        "| preset | parameters | lr | validation, mean of 3 (min to max) | test, mean of 3 (min to max) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for preset in PRESETS:
        mine = [r for r in runs if r["preset"] == preset and r["rate"] == best[preset]]
        cells = [
            f"{statistics.mean(v):.4f} ({min(v):.4f} to {max(v):.4f})"
            for v in ([r[k] for r in mine] for k in ("validation", "test"))
        ]
        lines.append(f"| {preset} | {mine[0]['parameters']:,} | {best[preset]:g} | {cells[0]} | {cells[1]} |")
    rates = sorted({r["rate"] for r in runs})
    lines += [
        "",
        "| preset (seed 0, validation) | " + " | ".join(f"lr {r:g}" for r in rates) + " |",
        "| --- " * (len(rates) + 1) + "|",
    ]
    for preset in PRESETS:
        found = {r["rate"]: r["validation"] for r in runs if r["preset"] == preset and r["seed"] == SEEDS[0]}
        lines.append(f"| {preset} | " + " | ".join(f"{found[r]:.4f}" if r in found else "" for r in rates) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
