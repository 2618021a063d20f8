"""Parity of a bit string at every position: trained on windows of 40, tested at length 160.

`reset` trains on strings of 40. `carry` trains on windows of 40, four to a string, and hands the detached state on from
one to the next (truncated backpropagation through time), so that gradients still never span more than 40 tokens.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from nestling import NestlingForCausalLM, presets
from reproductions.harness.command import Reproduction
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row, Rows

WINDOW, WINDOWS, ROWS = 40, 4, 32
TEST_LENGTHS = (40, 160, 640)
TEST_ROWS = 256
SEEDS = (0, 1, 2)
TRAININGS = ("reset", "carry")
RATE, WARMUP = 1e-2, 50
PRESETS = {"hope_linear": presets.hope_linear, "hope": presets.hope}
# No retention, since a state that fades cannot count. Gates that reach their ends, since 40 tokens do not tell a flip
# of -0.97 from one of -1; writes and hidden layers that start small, since what a flip adds to a memory stays there.
SETTINGS: dict[str, dict[str, Any]] = {
    "hope_linear": {"use_retention": False, "gate_scale": 16.0, "inner_lr_scale": 0.02},
    "hope": {"use_retention": False, "gate_scale": 16.0, "inner_lr_scale": 0.002, "hidden_erase_scale": 0.0001},
}


def build(preset: str) -> NestlingForCausalLM:
    """Two layers of width 32."""
    config = PRESETS[preset](vocab_size=2, hidden_size=32, num_layers=2, num_heads=2, chunk_size=16, periods=(None,))
    for block in config.blocks:
        block["mixer"].update(SETTINGS[preset])
    return NestlingForCausalLM(config)


def strings(rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits and their running parity."""
    bits = torch.randint(0, 2, (rows, length), generator=generator)
    return bits, bits.cumsum(1) % 2


def train(model: NestlingForCausalLM, steps: int, windows: int, generator: torch.Generator) -> float:
    """AdamW with warm-up and linear decay, one step a window; the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
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
    return float((model(bits).logits.argmax(-1) == parity).float().mean())


def measure(preset: str, how: str, seed: int, steps: int, test_rows: int = TEST_ROWS) -> Row:
    """One training and its tests."""
    torch.manual_seed(seed)
    model = build(preset)
    loss = train(model, steps, WINDOWS if how == "carry" else 1, torch.Generator().manual_seed(seed))
    model.eval()
    tests = torch.Generator().manual_seed(1000)
    found = {str(length): accuracy(model, test_rows, length, tests) for length in TEST_LENGTHS}
    print(f"{preset:12} {how:6} seed {seed}: loss {loss:.5f}, accuracy {found}", flush=True)
    return {"loss": loss, "accuracy": found}


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Every preset and way of training that is asked for, at every seed."""
    for preset in args.presets:
        for how in args.trainings:
            for seed in args.seeds:
                key = {"preset": preset, "training": how, "seed": seed, "steps": args.steps}
                key |= {"learning_rate": RATE, "rows": ROWS}
                rows.get(key, lambda p=preset, h=how, s=seed: measure(p, h, s, args.steps))


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Ten steps and four strings."""
    for preset in PRESETS:
        rows.get({"preset": preset, "training": "carry", "seed": 0}, lambda p=preset: measure(p, "carry", 0, 10, 4))


def report(rows: Sequence[Row]) -> Report:
    """Accuracy at every length, the mean of the seeds and each seed."""
    lines = []
    for preset in PRESETS:
        for how in TRAININGS:
            own = sorted((r for r in rows if (r["preset"], r["training"]) == (preset, how)), key=lambda r: r["seed"])
            if own:
                cells = [_told([r["accuracy"][str(length)] for r in own]) for length in TEST_LENGTHS]
                lines.append([f"`{preset}`", how, *cells])
    head = ["preset", "training", *(f"length {n}" for n in TEST_LENGTHS)]
    return Report({"results": table(head, lines) if lines else EMPTY})


def _told(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ({', '.join(f'{v:.4f}' for v in values)})"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which trainings."""
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--trainings", nargs="*", default=list(TRAININGS), choices=TRAININGS)
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=600)


REPRODUCTION = Reproduction(run, report, quick, arguments)
