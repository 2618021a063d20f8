"""Memory Caching on recall: a DeltaNet whose state is too small for the pairs, with and without kept memories.

One layer of width 64, one training for two difficulties of multi-query associative recall (`mqar`): the first third of
its steps are the easy task, the rest the hard one. A DeltaNet of many narrow heads has a small state; kept at the end
of every segment its memory grows. All models have the same learning rate, steps and, within 5%, parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from nestling import NestlingConfig, NestlingForCausalLM, presets
from nestling.optim.groups import parameter_groups
from nestling.tasks.associative_recall import IGNORE, RecallTask
from reproductions.harness.command import Reproduction
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row, Rows
from reproductions.harness.schedule import warm_cosine

VOCABULARY, WIDTH = 64, 64
TASKS = {"4 pairs in 32": RecallTask(32, 4, VOCABULARY), "16 pairs in 64": RecallTask(64, 16, VOCABULARY)}
INITIALIZER_RANGE = 0.125  # embeddings of length 1, as in `mqar`
SEEDS = (0, 1, 2)
RATE = 1e-2
TOKENS_PER_STEP = 1024
TEST_ROWS, TEST_SEED = 512, 10_000
# Width of the keys of a head, and settings of Memory Caching if there is any. All heads together write `WIDTH` values.
MODELS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "keys of 4": (4, None),
    "keys of 4, residual": (4, {"variant": "residual"}),
    "keys of 4, gated": (4, {"variant": "gated"}),
    "keys of 4, gated, checkpoints": (4, {"variant": "gated", "restart": False}),
    "keys of 4, sparse, 1 read": (4, {"variant": "sparse", "top_k": 1}),
    "keys of 8": (8, None),
    "keys of 8, gated": (8, {"variant": "gated"}),
    "keys of 16": (16, None),
}


def build(name: str, segment: int, seed: int) -> NestlingForCausalLM:
    """One layer; it has a short convolution, so that a key can be bound to the value after it."""
    key_width, caching = MODELS[name]
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": 1, "num_heads": WIDTH // key_width}
    config: NestlingConfig
    if caching is None:
        config = presets.deltanet("tiny", **sizes)
    else:
        config = presets.memory_caching("tiny", memory="deltanet", segment_size=segment, **sizes, **caching)
    config.initializer_range = INITIALIZER_RANGE
    return NestlingForCausalLM(config)


def train(model: NestlingForCausalLM, steps: int, seed: int) -> None:
    """AdamW, warm-up, cosine to a tenth; fresh sequences at every step."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=RATE, betas=(0.9, 0.95))
    schedule = warm_cosine(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    easy, hard = TASKS.values()
    for step in range(steps):
        task = easy if step < steps // 3 else hard
        tokens, answers = task.sample(TOKENS_PER_STEP // task.length, generator)
        asked = answers != IGNORE
        F.cross_entropy(model(tokens, use_cache=False).logits[asked], answers[asked]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: NestlingForCausalLM, task: RecallTask, rows: int) -> float:
    """Share of the queries answered rightly."""
    tokens, answers = task.sample(rows, torch.Generator().manual_seed(TEST_SEED))
    asked = answers != IGNORE
    return float((model(tokens, use_cache=False).logits.argmax(-1) == answers)[asked].float().mean())


@torch.no_grad()
def state_bytes(model: NestlingForCausalLM, task: RecallTask) -> int:
    """What the model carries after reading one sequence."""
    tokens, _ = task.sample(1, torch.Generator().manual_seed(0))
    return int(model(tokens, use_cache=True).past_key_values.nbytes)


def measure(name: str, segment: int, seed: int, steps: int, test_rows: int = TEST_ROWS) -> Row:
    """One training and its tests."""
    start = time.perf_counter()
    model = build(name, segment, seed)
    train(model, steps, seed)
    row = {
        "test": [accuracy(model, task, test_rows) for task in TASKS.values()],
        "state_bytes": [state_bytes(model, task) for task in TASKS.values()],
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    shown = ", ".join(f"{value:.3f}" for value in row["test"])
    print(f"{name}, segments of {segment}, seed {seed}: {shown} in {row['seconds']:.0f} s", flush=True)
    return row


def run(args: argparse.Namespace, rows: Rows) -> None:
    """All models, seed by seed."""
    for seed in args.seeds:
        for name in args.models:
            segment = args.segment if MODELS[name][1] is not None else None
            key = {"model": name, "segment": segment, "seed": seed, "steps": args.steps, "rate": RATE}
            rows.get(key, lambda n=name, s=seed: measure(n, args.segment, s, args.steps))


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Two steps of two models."""
    for name in list(MODELS)[:3]:
        key = {"model": name, "segment": 8, "seed": 0, "steps": 2, "rate": RATE}
        rows.get(key, lambda n=name: measure(n, 8, 0, 2, 64))


def report(rows: Sequence[Row]) -> Report:
    """Accuracy of every task, the mean of the seeds and each seed, with the state after the sequence."""
    lines = []
    for name in MODELS:
        for segment in sorted({r["segment"] for r in rows if r["model"] == name}, key=lambda s: s or 0):
            own = sorted((r for r in rows if (r["model"], r["segment"]) == (name, segment)), key=lambda r: r["seed"])
            lines.append([name, "none" if segment is None else str(segment), *_cells(own)])
    head = ["DeltaNet with", "segment", *(f"{task}: accuracy (seeds), state" for task in TASKS)]
    return Report({"results": table(head, lines) if lines else EMPTY})


def _cells(rows: Sequence[Row]) -> list[str]:
    cells = []
    for i in range(len(TASKS)):
        values = [r["test"][i] for r in rows]
        each = ", ".join(f"{v:.3f}" for v in values)
        cells.append(f"{statistics.mean(values):.3f} ({each}), {rows[0]['state_bytes'][i] / 1024:.0f} KiB")
    return cells


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which trainings."""
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--segment", type=int, default=8, help="tokens after which a memory is kept")
    parser.add_argument("--steps", type=int, default=600)


REPRODUCTION = Reproduction(run, report, quick, arguments)
