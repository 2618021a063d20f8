"""Tiny Hope and Transformer++ language models on the embedded corpus under AdamW, Muon, M3 and delta momentum.

Two blocks of width 128, bytes, batches of 4 x 256 tokens, 10% warm-up, cosine to a tenth, weight decay 0.1; learning
rates as in run.py, chosen on the first half of the held-out text with seed 0, three seeds at the best, and the figures
are of its second half.
"""

from __future__ import annotations

import statistics
import tempfile
import time

from rich.console import Console
from transformers import AutoModelForCausalLM

from nestling.evaluation.language import evaluate_loss
from nestling.training import TrainConfig, train
from nestling.training.corpus import prepare_data
from nestling.training.divergence import DivergenceError
from reproductions.harness.report import table
from reproductions.harness.rows import Row

PRESETS = ("transformer", "hope")
STARTS = {"adamw": 6e-3, "muon": 6e-3, "m3": 6e-3, "delta_momentum": 0.4}
LENGTH = 256
HELD = 2 * 16 * LENGTH * 4
"""Held-out bytes, half of them to choose rates by."""


def run(name: str, rate: float, seed: int, tokens: int, held_tokens: int = HELD) -> Row:
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
        held = prepare_data(config.resolved()).valid[:held_tokens]
    half = len(held) // 2
    valid, test = (evaluate_loss(model, part, LENGTH, carry=False).loss for part in (held[:half], held[half:]))
    seconds = round(time.perf_counter() - start, 1)
    return {"diverged": False, "validation": valid, "test": test, "seconds": seconds}


def table_of(best: dict[str, list[Row]]) -> str:
    """Test losses at the best rate."""
    lines = []
    for name, rows in best.items():
        test = [r["test"] for r in rows]
        told = f"{statistics.mean(test):.4f} ({', '.join(f'{value:.4f}' for value in test)})"
        seconds = statistics.median(r["seconds"] for r in rows)
        lines.append([f"`{name}`", f"{rows[0]['rate']:.3g}", told, f"{seconds:.0f}"])
    return table(["model, optimizer", "lr", "test loss, nats per byte (seeds)", "seconds a run"], lines)
