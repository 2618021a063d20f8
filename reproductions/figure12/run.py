"""Time of one optimizer step against the model's size (NL Figure 12): AdamW, Muon, AdaMuon, M3, delta momentum.

    python -m reproductions figure12 [--sizes 2 10 40] [--threads 2] [--quick]

The parameters are a Transformer++'s of about so many millions, the gradients random, and only `step()` is timed: on a
real run the forward and backward pass come on top, the same for all. The optimizers take turns in every round, and a
round's times are divided by AdamW's and Muon's of the same round; medians of the rounds. AdaMuon is
pytorch_optimizer's, with its iteration in float32 as the others' is on a CPU. Writes results.json, table.md and
steps.svg beside this file after every size; sizes measured before on the same machine stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_optimizer.optimizer.muon import adamuon
from torch import nn

from nestling import NestlingForCausalLM, presets
from nestling.ops.newton_schulz import newton_schulz
from nestling.optim import build
from nestling.optim.groups import matrix_groups
from nestling.plotting.curves import Series, line_chart
from reproductions.harness.machine import processor_name

HERE = Path(__file__).parent
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


def measure(millions: int, rounds: int) -> dict[str, Any]:
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
    count = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {"parameters": count, "rounds": rounds}
    for name in NAMES:
        ratios = [a / b for a, b in zip(times[name], times["adamw"], strict=True)]
        over_muon = [a / b for a, b in zip(times[name], times["muon"], strict=True)]
        row[name] = {"ms": statistics.median(times[name]), "over_adamw": statistics.median(ratios),
                     "over_muon": statistics.median(over_muon), "range": [min(over_muon), max(over_muon)]}  # fmt: skip
        print(f"{count:,} parameters, {name}: {row[name]['ms']:.1f} ms, {row[name]['over_muon']:.2f}x Muon", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds, and the ratio to Muon's step."""
    lines = ["| parameters | " + " | ".join(f"`{n}`" for n in NAMES) + " |", "| --- " * (1 + len(NAMES)) + "|"]
    for row in rows:
        cells = [f"{row[n]['ms']:.1f} ms ({row[n]['over_muon']:.2f})" for n in NAMES]
        lines.append(f"| {row['parameters']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """All sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=int, default=[2, 10, 40], choices=list(WIDTHS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the smallest size once, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        measure(0, 1)
        return
    machine = {"threads": args.threads, "torch": torch.__version__, "processor": processor_name()}
    rows = known(machine)
    for size in args.sizes:
        new = measure(size, args.rounds)
        rows = sorted([r for r in rows if r["parameters"] != new["parameters"]] + [new], key=lambda r: r["parameters"])
        write(machine, rows)
    print(table(rows))


def known(machine: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured on this machine before."""
    path = HERE / "results.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    return record["rows"] if all(record.get(key) == value for key, value in machine.items()) else []


def write(machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """results.json, table.md and steps.svg."""
    (HERE / "table.md").write_text(table(rows))
    (HERE / "results.json").write_text(json.dumps(machine | {"rows": rows}, indent=1) + "\n")
    lines = [
        Series(name, [r["parameters"] / 1e6 for r in rows], [r[name]["ms"] for r in rows], i)
        for i, name in enumerate(NAMES)
    ]
    (HERE / "steps.svg").write_text(line_chart(lines, x_label="million parameters", y_label="milliseconds a step"))


if __name__ == "__main__":
    main()
