"""Multi-query associative recall (Zoology) for every preset: accuracy against the size of the state.

One training serves all difficulties of a setting. `small` has a vocabulary of 128 and three of them: the first half of
its steps are the easiest task, the rest the three in turn. `authors` is that of the authors: a vocabulary of 8,192,
sequences of up to 256 tokens with up to 64 pairs, five tasks in turn, and no filler that looks like keys or values.

Two layers of width 64. The learning rate of a preset is the one of the grid with the highest mean accuracy on
validation sequences after a training of --tune-steps at seed 0. Accuracy is over all queries of 512 test sequences of
each task.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from nestling import NestlingConfig, NestlingForCausalLM, presets
from nestling.optim.groups import parameter_groups
from nestling.tasks.associative_recall import IGNORE, RecallTask
from reproductions.harness.command import Reproduction
from reproductions.harness.grid import best_rate, fixed, grow_rate
from reproductions.harness.report import Report
from reproductions.harness.rows import Row, Rows
from reproductions.harness.schedule import warm_cosine
from reproductions.mqar.report import ablations, every_seed, presets_table
from reproductions.mqar.settings import SETTINGS, VOCABULARY, Task
from reproductions.mqar.variants import ABLATIONS, SIZED

# Embeddings of length 1, so that at this width the first layer's output does not drown a token's own.
INITIALIZER_RANGE = 0.125
GRID = (3e-3, 1e-2)
SEEDS = (0, 1, 2)
TOKENS_PER_STEP = 2048
TEST_ROWS, VALIDATION_ROWS = 512, 256
TEST_SEED, VALIDATION_SEED = 10_000, 20_000


def build(preset: str, seed: int, ablation: str | None = None, vocab_size: int = VOCABULARY) -> NestlingForCausalLM:
    """Two layers of width 64 (the paper's small models), four for Mamba-2, whose layers have half the parameters."""
    torch.manual_seed(seed)
    preset, changes = SIZED.get(preset, (preset, {} if ablation is None else ABLATIONS[ablation][1]))
    config: NestlingConfig = presets.PRESETS[preset]("tiny", vocab_size=vocab_size, hidden_size=64, num_layers=2)
    config.initializer_range = INITIALIZER_RANGE
    for block in config.blocks:
        block["mixer"].update(changes)
    return NestlingForCausalLM(config)


def train(
    model: NestlingForCausalLM, rate: float, steps: int, seed: int, tasks: Sequence[Task], easy: float = 0.5
) -> tuple[int, bool]:
    """AdamW, warm-up, cosine to a tenth; fresh sequences at every step. Steps taken, and whether the loss diverged.

    The share `easy` of the steps, the first ones, are of the first task, the rest of all in turn.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=rate, betas=(0.9, 0.95))
    schedule = warm_cosine(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        task = tasks[0] if step < int(steps * easy) else tasks[step % len(tasks)]
        tokens, answers = task.sample(TOKENS_PER_STEP // task.length, generator)
        asked = answers != IGNORE
        loss = F.cross_entropy(logits_at(model, tokens, asked), answers[asked])
        if not torch.isfinite(loss):
            return step, True
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return steps, False


def logits_at(model: NestlingForCausalLM, tokens: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """`[asked places, vocabulary]`: those of all places would cost more than the model."""
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state[asked]
    return model.lm_head(hidden * model.config.logit_scale)


@torch.no_grad()
def accuracy(model: NestlingForCausalLM, task: Task, rows: int, seed: int) -> float:
    """Share of the queries answered rightly."""
    generator = torch.Generator().manual_seed(seed)
    right = total = 0
    for _ in range(rows // 64):
        tokens, answers = task.sample(64, generator)
        asked = answers != IGNORE
        right += int((logits_at(model, tokens, asked).argmax(-1) == answers[asked]).sum())
        total += int(asked.sum())
    return right / total


@torch.no_grad()
def state_bytes(model: NestlingForCausalLM, task: RecallTask) -> int:
    """What the model carries after reading one sequence."""
    tokens, _ = task.sample(1, torch.Generator().manual_seed(0))
    return int(model(tokens, use_cache=True).past_key_values.nbytes)


def measure(
    rows: Rows, preset: str, seed: int, rate: float, steps: int, ablation: str | None = None, setting: str = "small"
) -> Row:
    """One training, unless it is there already."""
    name = {"setting": setting, "preset": preset, "seed": seed, "rate": rate, "steps": steps, "ablation": ablation}
    return rows.get(name, lambda: _trained(name, VALIDATION_ROWS, TEST_ROWS))


def _trained(name: Row, validation_rows: int, test_rows: int) -> Row:
    start = time.perf_counter()
    setting, ablation = SETTINGS[name["setting"]], name["ablation"]
    model = build(name["preset"], name["seed"], ablation, setting.vocab_size)
    taken, diverged = train(model, name["rate"], name["steps"], name["seed"], setting.train, setting.easy)
    tests = setting.test.values()
    row = {
        "taken": taken,
        "diverged": diverged,
        "validation": [accuracy(model, t, validation_rows, VALIDATION_SEED) for t in tests],
        "test": [accuracy(model, t, test_rows, TEST_SEED) for t in tests],
        "state_bytes": [state_bytes(model, t) for t in tests],
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    shown = ", ".join(f"{value:.3f}" for value in row["test"])
    told = f"{name['setting']} {name['preset']} {ablation or ''} seed {name['seed']} lr {name['rate']:g}"
    print(f"{told}: {shown} in {row['seconds']:.0f} s", flush=True)
    return row


def tuned(rows: Rows, preset: str, steps: int, setting: str = "small") -> float:
    """The grid's best at seed 0 after `steps`. An ablation takes its preset's, so that it changes one thing."""

    def loss(rate: float) -> float:
        return -quality(measure(rows, preset, SEEDS[0], rate, steps, setting=setting))

    return best_rate(grow_rate(loss, GRID, neighbour=fixed))


def quality(row: Row) -> float:
    """Mean validation accuracy."""
    return float(sum(row["validation"]) / len(row["validation"]))


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Rates, then all presets or ablations and seeds.

    Raises:
        SystemExit: ablations of another setting than `small`.
    """
    names: list[tuple[str, str | None]] = [(preset, None) for preset in args.presets]
    if args.ablations is not None:
        if args.setting != "small":
            raise SystemExit("--ablations are of the setting small; leave --setting out")
        names = [(ABLATIONS[change][0], change) for change in args.ablations or ABLATIONS]
    rates = {name: tuned(rows, name[0], args.tune_steps, args.setting) for name in names}
    for seed in args.seeds:
        for (preset, ablation), rate in rates.items():
            measure(rows, preset, seed, rate, args.steps, ablation, args.setting)


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Two steps of one preset at one rate."""
    name = {"setting": args.setting, "preset": args.presets[0], "seed": SEEDS[0], "rate": GRID[0], "steps": 2}
    name |= {"ablation": None}
    rows.get(name, lambda: _trained(name, 64, 64))


def report(rows: Sequence[Row]) -> Report:
    """A table and a picture of every setting, and the ablations. Rows of before there were two settings name none."""
    parts, pictures = {}, {}
    for setting, about in SETTINGS.items():
        part, picture = ("results", "recall.svg") if setting == "small" else (setting, f"{setting}.svg")
        own = [row for row in rows if row.get("setting", "small") == setting]
        parts[part], draw = presets_table(chosen(own), list(about.test), picture)
        parts[f"{part}_seeds"] = every_seed(chosen(own), list(about.test))
        pictures |= {picture: draw} if draw else {}
        if setting == "small":
            parts |= {preset: ablations(changed(own, preset), list(about.test)) for preset in ("titans_lmm", "hope")}
    return Report(parts, pictures)


def chosen(rows: Sequence[Row]) -> list[Row]:
    """The longest trainings there are of the presets, at the rates that the shortest chose."""
    plain = [row for row in rows if row.get("ablation") is None]
    steps, rates = max((row["steps"] for row in plain), default=0), _rates(rows)
    return [row for row in plain if row["steps"] == steps and row["rate"] == rates.get(row["preset"])]


def changed(rows: Sequence[Row], preset: str) -> list[Row]:
    """Its longest ablations at its rate, after the same trainings of the preset itself."""
    own = [row for row in rows if row["preset"] == preset and row["rate"] == _rates(rows).get(preset)]
    ablated = [row for row in own if row["ablation"] is not None]
    ablated = [row for row in ablated if row["steps"] == max(other["steps"] for other in ablated)]
    names = {(row["seed"], row["steps"]) for row in ablated}
    return [row for row in own if row["ablation"] is None and (row["seed"], row["steps"]) in names] + ablated


def _rates(rows: Sequence[Row]) -> dict[str, float]:
    """Of every preset, the best of its trainings at seed 0 with the fewest steps there are."""
    tune_steps = min((row["steps"] for row in rows), default=0)
    tuning: dict[str, list[Row]] = {}
    for row in rows:
        if row["steps"] == tune_steps and row["seed"] == SEEDS[0] and row.get("ablation") is None:
            tuning.setdefault(row["preset"], []).append(row)
    return {preset: max(own, key=quality)["rate"] for preset, own in tuning.items()}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which trainings."""
    parser.add_argument("--setting", default="small", choices=list(SETTINGS), help="which tasks (default: small)")
    parser.add_argument("--presets", nargs="*", default=list(presets.PRESETS), choices=[*presets.PRESETS, *SIZED])
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument(
        "--ablations", nargs="*", choices=list(ABLATIONS), help="these, or all where none is named, not the presets"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--tune-steps", type=int, default=1000, help="of the trainings that choose the rate")


REPRODUCTION = Reproduction(run, report, quick, arguments)
