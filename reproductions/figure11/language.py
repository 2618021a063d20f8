"""Tiny Hope and Transformer++ language models on the embedded corpus under AdamW, Muon, M3 and delta momentum.

    python -m reproductions.figure11.language [--tokens 100000]

Two blocks of width 128, bytes, batches of 4 x 256 tokens, 10% warm-up, cosine to a tenth, weight decay 0.1; learning
rates as in run.py, chosen on the first half of the held-out text with seed 0, three seeds at the best, and the figures
are of its second half. Finished runs are kept in language.jsonl; language.md comes at the end.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from nestling.evaluation.language import evaluate_loss
from nestling.training import TrainConfig, train
from nestling.training.corpus import prepare_data
from nestling.training.divergence import DivergenceError
from reproductions.figure11.tune import Row, Runs, grid_table

HERE = Path(__file__).parent
PRESETS = ("transformer", "hope")
STARTS = {"adamw": 6e-3, "muon": 6e-3, "m3": 6e-3, "delta_momentum": 0.4}
LENGTH = 256


def run(name: str, rate: float, seed: int, tokens: int) -> Row:
    """One training: losses in nats per byte on both halves of the held-out text."""
    preset, optimizer = name.split()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            out=f"{folder}/run",
            preset=preset,
            overrides={"hidden_size": 128, "num_layers": 2, "num_heads": 2},
            optimizer=optimizer,
            tokens=tokens,
            sequence_length=LENGTH,
            batch_size=4,
            learning_rate=rate,
            seed=seed,
            eval_every=10**6,
            save_every=10**6,
            eval_tokens=256,
            sample_tokens=0,
            tensorboard=False,
        )
        try:
            train(config, console=Console(quiet=True))
        except DivergenceError:
            return {"diverged": True, "validation": float("inf"), "test": float("inf"), "seconds": 0.0}
        model = AutoModelForCausalLM.from_pretrained(config.out).eval()
        held = prepare_data(config.resolved()).valid[: 2 * 16 * LENGTH * 4]
    half = len(held) // 2
    valid, test = (evaluate_loss(model, part, LENGTH, carry=False).loss for part in (held[:half], held[half:]))
    seconds = round(time.perf_counter() - start, 1)
    return {"diverged": False, "validation": valid, "test": test, "seconds": seconds}


def main() -> None:
    """Grid, seeds, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = Runs(HERE / "language.jsonl", lambda name, rate, seed: run(name, rate, seed, args.tokens))
    names = {f"{preset} {name}": start for preset in PRESETS for name, start in STARTS.items()}
    grids = {name: runs.tune(name, start) for name, start in names.items()}
    best = {name: runs.seeds(grid) for name, grid in grids.items()}
    lines = [
        "| model, optimizer | lr | test loss, nats per byte (seeds) | seconds a run |",
        "| --- | --- | --- | --- |",
    ]
    for name, rows in best.items():
        test = [r["test"] for r in rows]
        each = ", ".join(f"{value:.4f}" for value in test)
        seconds = statistics.median(r["seconds"] for r in rows)
        lines.append(f"| `{name}` | {rows[0]['rate']:.3g} | {statistics.mean(test):.4f} ({each}) | {seconds:.0f} |")
    text = "\n".join([*lines, "", *grid_table(grids)]) + "\n"
    (HERE / "language.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
