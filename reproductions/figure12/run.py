"""Time of one optimizer step against the model's size (NL Figure 12): AdamW, Muon, AdaMuon, M3, delta momentum.

The parameters are a Transformer++'s of about so many millions, the gradients random, and only `step()` is timed: on a
real run the forward and backward pass come on top, the same for all. The optimizers take turns in every round, and a
round's times are divided by AdamW's and Muon's of the same round; medians of the rounds. AdaMuon is
pytorch_optimizer's, with its iteration in float32 as the others' is on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from pytorch_optimizer.optimizer.muon import adamuon
from torch import nn

from nestling import NestlingForCausalLM, presets
from nestling.ops.newton_schulz import newton_schulz
from nestling.optim import build
from nestling.optim.groups import matrix_groups
from nestling.plotting.curves import Series, line_chart
from reproductions.harness.command import Reproduction
from reproductions.harness.machine import processor_name
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row, Rows

NAMES = ("adamw", "muon", "adamuon", "m3", "delta_momentum")
WIDTHS = {0: (64, 1), 2: (192, 4), 10: (384, 6), 40: (640, 8), 140: (1024, 12)}


def model_of(millions: int) -> nn.Module:
    """A Transformer++ of about so many parameters, embeddings small."""
    width, layers = WIDTHS[millions]
    config = presets.transformer("tiny", vocab_size=256, hidden_size=width, num_layers=layers, num_heads=width // 64)
    return NestlingForCausalLM(config)


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """With the settings each has by default; AdaMuon on the same matrices as Muon and M3."""
    if name != "adamuon":
        return build(name, model, lr=1e-4, weight_decay=0.1)
    groups = [{"params": g["params"], "use_muon": g["kind"] == "matrices"} for g in matrix_groups(model, 0.1)]
    # Its own iterates in bfloat16, which CPUs emulate at a fiftieth of the speed.
    adamuon.zero_power_via_newton_schulz_5 = lambda update, num_steps, weights: newton_schulz(update, num_steps)
    optimizer: torch.optim.Optimizer = adamuon.AdaMuon(groups, lr=1e-4, weight_decay=0.1)
    return optimizer


def measure(millions: int, rounds: int) -> Row:
    """Median milliseconds of a step and median ratio to AdamW's, for every optimizer."""
    model = model_of(millions)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
    optimizers = {name: optimizer_of(name, model) for name in NAMES}
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    # Twice M3's slow period, so that a mean holds its share of slow steps.
    steps = 16
    for optimizer in optimizers.values():
        optimizer.step()
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            for _ in range(steps):
                optimizer.step()
            times[name].append(1e3 * (time.perf_counter() - start) / steps)
    row: Row = {}
    for name in NAMES:
        ratios = [a / b for a, b in zip(times[name], times["adamw"], strict=True)]
        over_muon = [a / b for a, b in zip(times[name], times["muon"], strict=True)]
        row[name] = {"ms": statistics.median(times[name]), "over_adamw": statistics.median(ratios),
                     "over_muon": statistics.median(over_muon), "range": [min(over_muon), max(over_muon)]}  # fmt: skip
        print(
            f"{millions} million parameters, {name}: {row[name]['ms']:.1f} ms, {row[name]['over_muon']:.2f}x Muon",
            flush=True,
        )
    return row


def run(args: argparse.Namespace, rows: Rows) -> None:
    """All sizes."""
    for size in args.sizes:
        key = {"parameters": sum(p.numel() for p in model_of(size).parameters()), "rounds": args.rounds}
        key |= {"threads": args.threads, "torch": torch.__version__, "processor": processor_name()}
        rows.get(key, lambda size=size: measure(size, args.rounds))


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """The smallest size once."""
    args.sizes, args.rounds = [0], 1
    run(args, rows)


def report(rows: Sequence[Row]) -> Report:
    """Milliseconds, the ratio to Muon's step, and a picture."""
    if not rows:
        return Report({"results": EMPTY})
    rows = sorted(rows, key=lambda row: row["parameters"])
    lines = [
        [f"{row['parameters']:,}", *(f"{row[n]['ms']:.1f} ms ({row[n]['over_muon']:.2f})" for n in NAMES)]
        for row in rows
    ]
    slowest = sorted(NAMES, key=lambda name: -rows[-1][name]["ms"])
    series = [
        Series(name, [r["parameters"] / 1e6 for r in rows], [r[name]["ms"] for r in rows], NAMES.index(name))
        for name in slowest
    ]
    text = table(["parameters", *(f"`{n}`" for n in NAMES)], lines)
    labels = {"x_label": "million parameters", "y_label": "milliseconds a step"}
    return Report(
        {"results": f"{text}\n\n![milliseconds a step against parameters](steps.svg)"},
        {"steps.svg": lambda: line_chart(series, **labels)},
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes and rounds."""
    parser.add_argument("--sizes", nargs="*", type=int, default=[2, 10, 40], choices=list(WIDTHS))
    parser.add_argument("--rounds", type=int, default=5)


REPRODUCTION = Reproduction(run, report, quick, arguments, threads=2)
