"""Parity of a bit string at every position: trained on windows of 40, tested at length 160.

    python -m reproductions parity [--quick]

`reset` trains on strings of 40. `carry` trains on windows of 40, four to a string, and hands the detached state on from
one to the next (truncated backpropagation through time), so that gradients still never span more than 40 tokens.
Writes results.json and table.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from nestling import NestlingForCausalLM, presets

HERE = Path(__file__).parent
WINDOW, WINDOWS, ROWS = 40, 4, 32
TEST_LENGTHS = (40, 160, 640)
TEST_ROWS = 256
SEEDS = (0, 1, 2)
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
def accuracy(model: NestlingForCausalLM, length: int, generator: torch.Generator) -> float:
    """Share of positions answered rightly."""
    bits, parity = strings(TEST_ROWS, length, generator)
    return float((model(bits).logits.argmax(-1) == parity).float().mean())


def run(preset: str, how: str, seed: int, steps: int) -> dict[str, Any]:
    """One training and its tests."""
    torch.manual_seed(seed)
    model = build(preset)
    loss = train(model, steps, WINDOWS if how == "carry" else 1, torch.Generator().manual_seed(seed))
    model.eval()
    tests = torch.Generator().manual_seed(1000)
    found = {str(length): accuracy(model, length, tests) for length in TEST_LENGTHS}
    print(f"{preset:12} {how:6} seed {seed}: loss {loss:.5f}, accuracy {found}", flush=True)
    return {"preset": preset, "training": how, "seed": seed, "steps": steps, "loss": loss, "accuracy": found}


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: accuracy at every length, the mean of the seeds and each seed."""
    lines = ["| preset | training | " + " | ".join(f"length {n}" for n in TEST_LENGTHS) + " |"]
    lines.append("| --- " * (2 + len(TEST_LENGTHS)) + "|")
    for preset in PRESETS:
        for how in ("reset", "carry"):
            cells = []
            for length in TEST_LENGTHS:
                found = [r["accuracy"][str(length)] for r in runs if (r["preset"], r["training"]) == (preset, how)]
                cells.append(f"{statistics.mean(found):.4f} ({', '.join(f'{v:.4f}' for v in found)})")
            lines.append(f"| `{preset}` | {how} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """All presets, both ways of training, three seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="10 steps, one seed, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps, seeds = (10, SEEDS[:1]) if args.quick else (args.steps, SEEDS)
    runs = [run(p, how, seed, steps) for p in PRESETS for how in ("reset", "carry") for seed in seeds]
    if args.quick:
        return
    record = {"torch": torch.__version__, "threads": args.threads, "learning_rate": RATE, "rows": ROWS, "runs": runs}
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "table.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
