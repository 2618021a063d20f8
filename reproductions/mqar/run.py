"""Multi-query associative recall (Zoology) for every preset: accuracy against the size of the state.

One training serves three difficulties: the first half of its steps are the easiest task, the rest the three in turn.
Two layers of width 64. The learning rate of a preset is the one of the grid with the highest mean accuracy on
validation sequences after a training of --tune-steps at seed 0. Accuracy is over all queries of 512 test sequences of
each task.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from nestling import NestlingConfig, NestlingForCausalLM, presets
from nestling.optim.groups import parameter_groups
from nestling.tasks.associative_recall import IGNORE, OverwriteTask, RecallTask
from reproductions.harness.command import Reproduction
from reproductions.harness.grid import best_rate, fixed, grow_rate
from reproductions.harness.report import EMPTY, Report
from reproductions.harness.rows import Row, Rows
from reproductions.mqar.report import make_report

Task = RecallTask | OverwriteTask
VOCABULARY = 128
TASKS = {
    "4 pairs in 32": RecallTask(32, 4, VOCABULARY),
    "16 pairs in 64": RecallTask(64, 16, VOCABULARY),
    "32 pairs in 128": RecallTask(128, 32, VOCABULARY),
}
# Embeddings of length 1, so that at this width the first layer's output does not drown a token's own.
INITIALIZER_RANGE = 0.125
GRID = (3e-3, 1e-2)
SEEDS = (0, 1, 2)
TOKENS_PER_STEP = 2048
WARMUP = 0.1
TEST_ROWS, VALIDATION_ROWS = 512, 256
TEST_SEED, VALIDATION_SEED = 10_000, 20_000
# Settings of the mixer that differ from the preset's, one question each.
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "chunk 1": ("titans_lmm", {"chunk_size": 1}),
    "chunk 16": ("titans_lmm", {"chunk_size": 16}),
    "chunk 256": ("titans_lmm", {"chunk_size": 256}),
    "no momentum": ("titans_lmm", {"momentum": False}),
    "9 times the inner learning rate": ("titans_lmm", {"inner_lr_scale": 0.9}),
    "no retention": ("titans_lmm", {"use_retention": False}),
    "no output gate": ("titans_lmm", {"output_gate": False}),
    "chunk gradients": ("titans_lmm", {"gradient": "chunk"}),
    "ascent in place of descent": ("titans_lmm", {"gradient": "chunk", "ascend": True}),
    "chunk 1, 2 inner steps": ("titans_lmm", {"chunk_size": 1, "inner_steps": 2}),
}


def build(preset: str, seed: int, ablation: str | None = None) -> NestlingForCausalLM:
    """Two layers of width 64 (the paper's small models), four for Mamba-2, whose layers have half the parameters."""
    torch.manual_seed(seed)
    config: NestlingConfig = presets.PRESETS[preset]("tiny", vocab_size=VOCABULARY, hidden_size=64, num_layers=2)
    config.initializer_range = INITIALIZER_RANGE
    if ablation is not None:
        for block in config.blocks:
            block["mixer"].update(ABLATIONS[ablation][1])
    return NestlingForCausalLM(config)


def train(
    model: NestlingForCausalLM, rate: float, steps: int, seed: int, tasks: Sequence[Task] = tuple(TASKS.values())
) -> tuple[int, bool]:
    """AdamW, warm-up, cosine to a tenth; fresh sequences at every step. Steps taken, and whether the loss diverged.

    The first half are of the first task, the rest of all in turn.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, steps, pct_start=WARMUP, div_factor=25, final_div_factor=0.4, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        task = tasks[0] if step < steps // 2 else tasks[step % len(tasks)]
        tokens, answers = task.sample(TOKENS_PER_STEP // task.length, generator)
        asked = answers != IGNORE
        loss = F.cross_entropy(model(tokens, use_cache=False).logits[asked], answers[asked])
        if not torch.isfinite(loss):
            return step, True
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return steps, False


@torch.no_grad()
def accuracy(model: NestlingForCausalLM, task: Task, rows: int, seed: int) -> float:
    """Share of the queries answered rightly."""
    generator = torch.Generator().manual_seed(seed)
    right = total = 0
    for _ in range(rows // 64):
        tokens, answers = task.sample(64, generator)
        asked = answers != IGNORE
        right += int((model(tokens, use_cache=False).logits.argmax(-1) == answers)[asked].sum())
        total += int(asked.sum())
    return right / total


@torch.no_grad()
def state_bytes(model: NestlingForCausalLM, task: RecallTask) -> int:
    """What the model carries after reading one sequence."""
    tokens, _ = task.sample(1, torch.Generator().manual_seed(0))
    return int(model(tokens, use_cache=True).past_key_values.nbytes)


def measure(rows: Rows, preset: str, seed: int, rate: float, steps: int, ablation: str | None = None) -> Row:
    """One training, unless it is there already."""
    name = {"preset": preset, "seed": seed, "rate": rate, "steps": steps, "ablation": ablation}
    return rows.get(name, lambda: _trained(name, VALIDATION_ROWS, TEST_ROWS))


def _trained(name: Row, validation_rows: int, test_rows: int) -> Row:
    start = time.perf_counter()
    preset, seed, ablation = name["preset"], name["seed"], name["ablation"]
    model = build(preset, seed, ablation)
    taken, diverged = train(model, name["rate"], name["steps"], seed)
    row = {
        "taken": taken,
        "diverged": diverged,
        "validation": [accuracy(model, t, validation_rows, VALIDATION_SEED) for t in TASKS.values()],
        "test": [accuracy(model, t, test_rows, TEST_SEED) for t in TASKS.values()],
        "state_bytes": [state_bytes(model, t) for t in TASKS.values()],
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    shown = ", ".join(f"{value:.3f}" for value in row["test"])
    print(f"{preset} {ablation or ''} seed {seed} lr {name['rate']:g}: {shown} in {row['seconds']:.0f} s", flush=True)
    return row


def tuned(rows: Rows, preset: str, steps: int) -> float:
    """The grid's best at seed 0 after `steps`. An ablation takes its preset's, so that it changes one thing."""
    return best_rate(
        grow_rate(lambda rate: -quality(measure(rows, preset, SEEDS[0], rate, steps)), GRID, neighbour=fixed)
    )


def quality(row: Row) -> float:
    """Mean validation accuracy."""
    return float(sum(row["validation"]) / len(row["validation"]))


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Rates, then all presets or ablations and seeds."""
    names: list[tuple[str, str | None]] = [(preset, None) for preset in args.presets]
    if args.ablations is not None:
        names = [(ABLATIONS[change][0], change) for change in args.ablations or ABLATIONS]
    rates = {name: tuned(rows, name[0], args.tune_steps) for name in names}
    for seed in args.seeds:
        for (preset, ablation), rate in rates.items():
            measure(rows, preset, seed, rate, args.steps, ablation)


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Two steps of one preset at one rate."""
    name = {"preset": args.presets[0], "seed": SEEDS[0], "rate": GRID[0], "steps": 2, "ablation": None}
    rows.get(name, lambda: _trained(name, 64, 64))


def report(rows: Sequence[Row]) -> Report:
    """Of the longest trainings there are, at the rates that the shortest chose."""
    if not rows:
        return Report({"results": EMPTY, "ablations": EMPTY})
    steps, tune_steps = (choose(row["steps"] for row in rows) for choose in (max, min))
    tuning: dict[str, list[Row]] = {}
    for row in rows:
        if row["steps"] == tune_steps and row["seed"] == SEEDS[0] and row["ablation"] is None:
            tuning.setdefault(row["preset"], []).append(row)
    rates = {preset: max(own, key=quality)["rate"] for preset, own in tuning.items()}
    return make_report([r for r in rows if r["steps"] == steps and r["rate"] == rates.get(r["preset"])], list(TASKS))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which trainings."""
    parser.add_argument("--presets", nargs="*", default=list(presets.PRESETS), choices=list(presets.PRESETS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument(
        "--ablations", nargs="*", choices=list(ABLATIONS), help="these, or all where none is named, not the presets"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--tune-steps", type=int, default=1000, help="of the trainings that choose the rate")


REPRODUCTION = Reproduction(run, report, quick, arguments)
