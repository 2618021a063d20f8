"""Multi-query associative recall (Zoology) for every preset: accuracy against the size of the state.

    python reproductions/mqar/run.py [--presets NAME ...] [--tasks NAME ...] [--ablations] [--quick]

Every finished training is appended to results.jsonl beside this file, and a second call skips what is there, so a run
can be stopped and continued. The learning rate of a preset is the best of the grid on the middle task's validation
sequences at seed 0, where no window holds a whole sequence. Accuracy is over all queries of 512 test sequences.
`table.md` and `recall.svg` are written at the end from all results there are.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from report import write_report  # beside this file
from torch.nn import functional as F

from nestling import NestlingConfig, NestlingForCausalLM, presets
from nestling.tasks.associative_recall import IGNORE, RecallTask
from nestling.training.weight_decay import parameter_groups

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
VOCABULARY = 256
TASKS = {
    "4 pairs in 64": RecallTask(64, 4, VOCABULARY),
    "16 pairs in 128": RecallTask(128, 16, VOCABULARY),
    "32 pairs in 256": RecallTask(256, 32, VOCABULARY),
}
EASIEST, MIDDLE, _ = TASKS
GRID = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
TOKENS_PER_STEP = 4096
WARMUP = 0.1
TEST_ROWS, VALIDATION_ROWS = 512, 256
TEST_SEED, VALIDATION_SEED = 10_000, 20_000
STOP_AT = 0.999
# Settings of the mixer that differ from the preset's, one question each.
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "chunk 1": ("titans_lmm", {"chunk_size": 1}),
    "chunk 16": ("titans_lmm", {"chunk_size": 16}),
    "chunk 64": ("titans_lmm", {"chunk_size": 64}),
    "chunk 256": ("titans_lmm", {"chunk_size": 256}),
    "no momentum": ("titans_lmm", {"momentum": False}),
    "no output gate": ("titans_lmm", {"output_gate": False}),
    "ascent in place of descent": ("titans_lmm", {"ascend": True}),
    "chunk 1, 4 inner steps": ("titans_lmm", {"chunk_size": 1, "inner_steps": 4}),
}


def build(preset: str, seed: int, ablation: str | None = None) -> NestlingForCausalLM:
    """Two layers of width 64 (the paper's small models), four for Mamba-2, whose layers have half the parameters."""
    torch.manual_seed(seed)
    config: NestlingConfig = presets.PRESETS[preset]("tiny", vocab_size=VOCABULARY, hidden_size=64, num_layers=2)
    if ablation is not None:
        for block in config.blocks:
            block["mixer"].update(ABLATIONS[ablation][1])
    return NestlingForCausalLM(config)


def train(model: NestlingForCausalLM, task: RecallTask, rate: float, steps: int, seed: int) -> tuple[int, bool]:
    """AdamW, warm-up, cosine to a tenth; fresh sequences at every step. Steps taken, and whether the loss diverged.

    It stops early when all is solved, which validation sequences tell, never the test's.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, steps, pct_start=WARMUP, div_factor=25, final_div_factor=0.4, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    rows = TOKENS_PER_STEP // task.length
    for step in range(steps):
        tokens, answers = task.sample(rows, generator)
        asked = answers != IGNORE
        logits = model(tokens, use_cache=False).logits[asked]
        loss = F.cross_entropy(logits, answers[asked])
        if not torch.isfinite(loss):
            return step, True
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 and loss < 0.05 and accuracy(model, task, VALIDATION_ROWS, VALIDATION_SEED) > STOP_AT:
            return step + 1, False
    return steps, False


@torch.no_grad()
def accuracy(model: NestlingForCausalLM, task: RecallTask, rows: int, seed: int) -> float:
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


class Results:
    """Finished trainings, one line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines()]

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The row with these values, or None."""
        return next((r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, on disk at once."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measure(
    results: Results, preset: str, task: str, seed: int, rate: float, steps: int, ablation: str | None = None
) -> dict[str, Any]:
    """One training, unless it is there already."""
    name = {"preset": preset, "task": task, "seed": seed, "rate": rate, "steps": steps, "ablation": ablation}
    if found := results.find(**name):
        return found
    start = time.perf_counter()
    model = build(preset, seed, ablation)
    taken, diverged = train(model, TASKS[task], rate, steps, seed)
    row = name | {
        "taken": taken,
        "diverged": diverged,
        "validation": accuracy(model, TASKS[task], VALIDATION_ROWS, VALIDATION_SEED),
        "test": accuracy(model, TASKS[task], TEST_ROWS, TEST_SEED),
        "state_bytes": state_bytes(model, TASKS[task]),
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    results.add(row)
    print(f"{preset} {ablation or ''} {task} seed {seed} lr {rate}: {row['test']:.3f} in {taken} steps", flush=True)
    return row


def best_rate(results: Results, preset: str, steps: int) -> float:
    """The grid's best on validation sequences of the middle task; ties go to the one that was quicker."""
    rows = [measure(results, preset, MIDDLE, SEEDS[0], rate, steps) for rate in GRID]
    return float(max(rows, key=_quality)["rate"])


def ablations(results: Results, seeds: list[int], steps: int) -> None:
    """Every ablation on the middle task, each with the best rate of the grid for itself."""
    for name, (preset, _) in ABLATIONS.items():
        rows = [measure(results, preset, MIDDLE, SEEDS[0], rate, steps, name) for rate in GRID]
        rate = float(max(rows, key=_quality)["rate"])
        for seed in seeds:
            measure(results, preset, MIDDLE, seed, rate, steps, name)
    report(results, steps)


def report(results: Results, steps: int) -> None:
    """The table and the picture of all trainings of `steps` steps at the rates that the middle task chose."""
    rows = [r for r in results.rows if r["steps"] == steps]
    tuned: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in rows:
        if row["task"] == MIDDLE and row["seed"] == SEEDS[0]:
            tuned.setdefault((row["preset"], row["ablation"]), []).append(row)
    rates = {key: max(found, key=_quality)["rate"] for key, found in tuned.items()}
    write_report([r for r in rows if rates.get((r["preset"], r["ablation"])) == r["rate"]], list(TASKS), HERE)


def _quality(row: dict[str, Any]) -> tuple[float, int]:
    """Higher is better: validation accuracy, then fewer steps."""
    return round(row["validation"], 3), -row["taken"]


def main() -> None:
    """Rates, then all tasks and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=list(presets.PRESETS), choices=list(presets.PRESETS))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument(
        "--ablations", action="store_true", help="the ablations, at the middle task, in place of all presets"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="2 steps of one preset, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        model = build(args.presets[0], 0)
        train(model, TASKS[EASIEST], GRID[0], 2, 0)
        print(f"{args.presets[0]}: accuracy {accuracy(model, TASKS[EASIEST], 64, TEST_SEED):.3f} after 2 steps")
        return
    results = Results(RESULTS)
    if args.ablations:
        ablations(results, args.seeds, args.steps)
        return
    rates = {preset: best_rate(results, preset, args.steps) for preset in args.presets}
    for task in args.tasks:
        for preset in args.presets:
            for seed in args.seeds:
                measure(results, preset, task, seed, rates[preset], args.steps)
    report(results, args.steps)


if __name__ == "__main__":
    main()
