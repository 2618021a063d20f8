"""Parity of a bit string at every position: trained on windows of 40, tested at lengths to 10,240.

`reset` trains on strings of 40. `carry` trains on windows of 40, four to a string, and hands the detached state on from
one to the next (truncated backpropagation through time), so that gradients still never span more than 40 tokens.

Two layers of width 32, every setting at its preset's default. The learning rate of a preset and way of training is the
one of the grid with the highest accuracy at a length and a seed that are not reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from nestling import NestlingForCausalLM, presets
from reproductions.harness.command import Reproduction
from reproductions.harness.grid import best_rate, fixed, grow_rate
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row, Rows

WINDOW, WINDOWS, ROWS = 40, 4, 32
TESTS = {40: 256, 160: 256, 640: 256, 2560: 64, 10240: 16}
"""Strings by their length: as many as keep the tokens of a test about equal."""
CHOICE = {320: 256}
"""The test that learning rates are chosen with."""
TEST_SEED, CHOICE_SEED = 1000, 2000
SEEDS, TUNE_SEED = (0, 1, 2), 3
GRID, WARMUP = (3e-3, 1e-2), 50
HELD = 0.99
"""Accuracy that a length is held with."""
TRAININGS = ("reset", "carry")
PRESETS = ("transformer", "deltanet", "gated_deltanet", "titans_lmm", "hope_linear", "hope")


def build(preset: str) -> NestlingForCausalLM:
    """Two layers of width 32 with two heads."""
    return NestlingForCausalLM(presets.PRESETS[preset](vocab_size=2, hidden_size=32, num_layers=2, num_heads=2))


def strings(rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits and their running parity."""
    bits = torch.randint(0, 2, (rows, length), generator=generator)
    return bits, bits.cumsum(1) % 2


def train(model: NestlingForCausalLM, rate: float, steps: int, windows: int, generator: torch.Generator) -> float:
    """AdamW with warm-up and linear decay, one step a window; the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / WARMUP) * max(0.02, 1 - i / steps)
    )
    state, loss = None, torch.tensor(0.0)
    for step in range(steps):
        window = step % windows
        if window == 0:
            bits, parity = strings(ROWS, WINDOW * windows, generator)
            state = None
        part = slice(window * WINDOW, (window + 1) * WINDOW)
        out = model(bits[:, part], past_key_values=state, use_cache=True)
        state = out.past_key_values.detach()
        loss = F.cross_entropy(out.logits.flatten(0, 1), parity[:, part].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def accuracy(model: NestlingForCausalLM, rows: int, length: int, generator: torch.Generator) -> float:
    """Share of positions answered rightly."""
    bits, parity = strings(rows, length, generator)
    return float((model(bits, use_cache=False).logits.argmax(-1) == parity).float().mean())


def trained(key: Mapping[str, Any], tests: Mapping[int, int], test_seed: int) -> Row:
    """One training, and its accuracy at every length of `tests`, on as many strings as that says."""
    start = time.perf_counter()
    torch.manual_seed(key["seed"])
    model = build(key["preset"])
    windows = WINDOWS if key["training"] == "carry" else 1
    generator = torch.Generator().manual_seed(key["seed"])
    loss = train(model, key["learning_rate"], key["steps"], windows, generator)
    model.eval()
    generator = torch.Generator().manual_seed(test_seed)
    found = {str(length): accuracy(model, rows, length, generator) for length, rows in tests.items()}
    seconds = round(time.perf_counter() - start, 1)
    shown = ", ".join(f"{length}: {value:.4f}" for length, value in found.items())
    print(f"{' '.join(map(str, key.values()))}: loss {loss:.5f}, accuracy {shown} in {seconds:.0f} s", flush=True)
    return {"loss": loss, "accuracy": found, "seconds": seconds}


def measure(rows: Rows, part: str, preset: str, how: str, seed: int, rate: float, steps: int) -> Row:
    """One training, unless it is there already; of the part `rate` or `test`."""
    key = {"part": part, "preset": preset, "training": how, "seed": seed, "steps": steps}
    key |= {"learning_rate": rate, "rows": ROWS}
    tests, seed = (CHOICE, CHOICE_SEED) if part == "rate" else (TESTS, TEST_SEED)
    return rows.get(key, lambda: trained(key, tests, seed))


def tuned(rows: Rows, preset: str, how: str, rates: Sequence[float], steps: int) -> float:
    """The grid's best at the seed and length that are not reported; of one rate there is nothing to choose."""
    if len(rates) == 1:
        return rates[0]

    def error(rate: float) -> float:
        found = measure(rows, "rate", preset, how, TUNE_SEED, rate, steps)["accuracy"]
        return 1 - statistics.mean(found.values())

    return best_rate(grow_rate(error, rates, neighbour=fixed))


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Every preset and way of training that is asked for: its rate, then every seed."""
    for preset in args.presets:
        for how in args.trainings:
            rate = tuned(rows, preset, how, args.rates, args.steps)
            for seed in args.seeds:
                measure(rows, "test", preset, how, seed, rate, args.steps)


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Ten steps and four strings."""
    for preset in ("hope_linear", "hope"):
        key = {"preset": preset, "training": "carry", "seed": 0, "steps": 10, "learning_rate": GRID[-1]}
        rows.get(key, lambda key=key: trained(key, {40: 4, 160: 4}, TEST_SEED))


def report(rows: Sequence[Row]) -> Report:
    """Accuracy at every length and the horizon, of the longest trainings: the mean of the seeds and each seed."""
    tested = [row for row in rows if row.get("part", "test") == "test"]
    if not tested:
        return Report({"results": EMPTY})
    steps, lines = max(row["steps"] for row in tested), []
    for preset in presets.PRESETS:
        for how in TRAININGS:
            own = [r for r in tested if (r["preset"], r["training"], r["steps"]) == (preset, how, steps)]
            for rate in sorted({row["learning_rate"] for row in own}):
                lines.append([f"`{preset}`", how, f"{rate:g}", *_cells([r for r in own if r["learning_rate"] == rate])])
    head = ["preset", "training", "learning rate", *(f"length {n:,}" for n in TESTS), "horizon"]
    return Report({"results": table(head, lines)})


def horizon(row: Row) -> int:
    """The longest length that the model still answers 99% of, as of all shorter ones; 0 for none."""
    held = 0
    for length, value in sorted((int(length), value) for length, value in row["accuracy"].items()):
        if value < HELD:
            break
        held = length
    return held


def _cells(rows: Sequence[Row]) -> list[str]:
    rows = sorted(rows, key=lambda row: row["seed"])
    by_length = [[row["accuracy"][str(n)] for row in rows if str(n) in row["accuracy"]] for n in TESTS]
    return [*map(_told, by_length), ", ".join(f"{horizon(row):,}" if horizon(row) else "none" for row in rows)]


def _told(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ({', '.join(f'{v:.4f}' for v in values)})" if values else ""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which trainings."""
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), choices=list(presets.PRESETS))
    parser.add_argument("--trainings", nargs="*", default=list(TRAININGS), choices=TRAININGS)
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rates", nargs="+", type=float, default=list(GRID), help="one of them is taken as it is")


REPRODUCTION = Reproduction(run, report, quick, arguments)
