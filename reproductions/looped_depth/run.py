"""Looped depth: one block run k times against k blocks and one block once, on p-hop induction and addition.

The blocks of all three models are alike, of width 64: `once` and `looped` have the parameters of one block, `deep`
those of k. One training serves all difficulties of a task in turn, at one learning rate for all models. Accuracy is
over all places that have an answer (p-hop induction) or over whole sums (addition), in 256 test sequences of each
difficulty.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from nestling import NestlingForCausalLM, presets
from nestling.optim.groups import parameter_groups
from nestling.tasks.addition import AdditionTask
from nestling.tasks.associative_recall import IGNORE
from nestling.tasks.hops import HopTask
from reproductions.harness.command import Reproduction
from reproductions.harness.report import Report
from reproductions.harness.rows import Row, Rows
from reproductions.harness.schedule import warm_cosine
from reproductions.looped_depth.report import make_report

Task = HopTask | AdditionTask
LOOPS = 4
MODELS: dict[str, dict[str, int]] = {
    "once": {"num_layers": 1, "loops": 1},
    "looped": {"num_layers": 1, "loops": LOOPS},
    "deep": {"num_layers": LOOPS, "loops": 1},
}
TASKS: dict[str, dict[str, Task]] = {
    "hops": {f"{p} hop{'s' * (p > 1)}": HopTask(64, p, 4) for p in (1, 2, 3, 4)},
    "addition": {f"{n} numbers": AdditionTask(n, 1) for n in (2, 3, 4, 6)},
}
RUN = (1, 2, 4, 6, 8)
"""Loops that the looped model is tested with."""
# Embeddings of length 1, so that at this width the first layer's output does not drown a token's own.
INITIALIZER_RANGE = 0.125
RATE = 3e-3
SEEDS = (0, 1, 2)
TOKENS_PER_STEP = 1024
TEST_ROWS, TEST_SEED = 256, 10_000


def build(preset: str, model: str, task: str, seed: int) -> NestlingForCausalLM:
    """One model of width 64 with the vocabulary of a task."""
    torch.manual_seed(seed)
    vocab_size = next(iter(TASKS[task].values())).vocab_size
    config = presets.PRESETS[preset]("tiny", vocab_size=vocab_size, hidden_size=64, **MODELS[model])
    config.initializer_range = INITIALIZER_RANGE
    return NestlingForCausalLM(config)


def train(model: NestlingForCausalLM, tasks: Sequence[Task], steps: int, seed: int) -> bool:
    """AdamW, warm-up, cosine to a tenth; fresh sequences at every step. Whether the loss stayed finite."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=RATE, betas=(0.9, 0.95))
    schedule = warm_cosine(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        task = tasks[step % len(tasks)]
        tokens, answers = task.sample(TOKENS_PER_STEP // task.length, generator)
        asked = answers != IGNORE
        loss = F.cross_entropy(model(tokens, use_cache=False).logits[asked], answers[asked])
        if not torch.isfinite(loss):
            return False
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return True


@torch.no_grad()
def accuracy(model: NestlingForCausalLM, task: Task, rows: int, loops: int | None = None) -> float:
    """Share of right answers; an addition's is its whole sum."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    right = total = 0
    for _ in range(rows // 64):
        tokens, answers = task.sample(64, generator)
        asked = answers != IGNORE
        found = model(tokens, use_cache=False, loops=loops).logits.argmax(-1) == answers
        if isinstance(task, AdditionTask):
            right += int((found | ~asked).all(1).sum())
            total += len(tokens)
        else:
            right += int(found[asked].sum())
            total += int(asked.sum())
    return right / total


def trained(name: Row, test_rows: int) -> Row:
    """One training and its tests, the looped model's with other numbers of loops too."""
    start = time.perf_counter()
    tasks = list(TASKS[name["task"]].values())
    model = build(name["preset"], name["model"], name["task"], name["seed"])
    finite = train(model, tasks, name["steps"], name["seed"])
    row = {
        "diverged": not finite,
        "test": [accuracy(model, task, test_rows) for task in tasks],
        "block_parameters": sum(p.numel() for p in model.blocks.parameters()),
    }
    if name["model"] == "looped":
        row["loops"] = {str(n): [accuracy(model, task, test_rows, n) for task in tasks] for n in RUN}
    row["seconds"] = round(time.perf_counter() - start, 1)
    shown = ", ".join(f"{value:.3f}" for value in row["test"])
    print(f"{' '.join(map(str, name.values()))}: {shown} in {row['seconds']:.0f} s", flush=True)
    return row


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Every model on every task, seed by seed."""
    for seed, preset, task, model in itertools.product(args.seeds, args.presets, args.tasks, args.models):
        measure(rows, {"preset": preset, "task": task, "model": model, "steps": args.steps, "seed": seed}, TEST_ROWS)


def measure(rows: Rows, name: Row, test_rows: int) -> Row:
    """One training, unless it is there already."""
    return rows.get(name | {"rate": RATE, "tokens": TOKENS_PER_STEP}, lambda: trained(name, test_rows))


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Two steps of two models."""
    for model in ("looped", "deep"):
        measure(rows, {"preset": "transformer", "task": "hops", "model": model, "steps": 2, "seed": 0}, 64)


def report(rows: Sequence[Row]) -> Report:
    """Of the longest trainings."""
    return make_report(rows, {task: list(difficulties) for task, difficulties in TASKS.items()})


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which trainings."""
    parser.add_argument("--presets", nargs="*", default=["transformer"], choices=list(presets.PRESETS))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=2000)


REPRODUCTION = Reproduction(run, report, quick, arguments)
