"""Class-incremental learning with a causal language model (NL section 9.1, Figure 6, at small scale).

    python -m reproductions figure6 --set clinc150 --data DIR --model PATH [--methods NAME ...] [--seeds 0 1 2]
    python -m reproductions figure6 --csv FILE --model PATH

Tasks of 15 classes (--classes) come one after the other; each training text is seen once, and after each task all
classes seen are asked, without a hint at the task. Every class has --per-class training texts and --test-per-class
test texts. Answers are labels: `Text: ...`, `Label:` and then a path of the label trie.

Settings of a method are chosen from the grid in methods.py, which grows until the best is not at its edge, by the
accuracy at the end of a validation stream: the first --tune-tasks tasks of another order of classes (and another choice
of training texts), asked about validation texts. No test text is asked before the settings stand. Joint training sees
all texts at once, in one shuffled pass.

`--measures N` measures the levels of the methods that have several (how alike their gradients are, how far they move)
every N steps of one more pass over the first seed's test stream in which nothing is asked.

Features of the frozen model are kept in --cache. `--quick` runs every method once on a tiny random model and a
synthetic set.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nestling.evaluation.class_incremental.features import TextFeatures
from nestling.evaluation.class_incremental.prompts import LabelPrompts
from nestling.evaluation.class_incremental.protocol import ClassLearner, run_class_incremental
from nestling.evaluation.class_incremental.training import LevelsWithMemory, TrainedClassifier
from nestling.models.pretrained import load_pretrained
from nestling.optim import MultiFrequency
from nestling.tasks.classification import (
    ClassificationSet,
    ClassTask,
    class_tasks,
    joined,
    read_clinc150,
    read_csv,
    read_dbpedia70,
    synthetic_set,
)
from nestling.training.tokenization import byte_tokenizer
from reproductions.figure6.methods import METHODS, PERIODS, Options, Setup
from reproductions.figure6.report import make_report
from reproductions.harness.command import Reproduction
from reproductions.harness.grid import grow, next_rate
from reproductions.harness.level_records import record_levels
from reproductions.harness.machine import add_machine_arguments, hardware, use_machine
from reproductions.harness.rows import Row, Rows
from reproductions.harness.tiny import tiny_llama

HERE = Path(__file__).parent
VALIDATION_SEED = 1000
READERS = {"clinc150": read_clinc150, "dbpedia70": read_dbpedia70}


@dataclass
class Experiment:
    """One set, one model, and the runs on them.

    Attributes:
        data: the set.
        model: pre-trained; every run gets a copy.
        name: of the model, for the results.
        prompts: of the model.
        sizes: `classes`, `per_class`, `test_per_class`, `tune_tasks`.
        layers: whose states are features.
        blocks: from the top, that hold levels.
        cache: folder of features.
        results: finished runs.
        greedy: answer by greedy descent in the label trie where all classes are asked.
    """

    data: ClassificationSet
    model: PreTrainedModel
    name: str
    prompts: LabelPrompts
    sizes: dict[str, int]
    layers: list[int]
    blocks: int
    cache: Path
    results: Rows
    greedy: bool = False

    def tasks(self, part: Any, seed: int) -> list[ClassTask]:
        """The stream of a part and seed."""
        limits = {"train_limit": self.sizes["per_class"], "test_limit": self.sizes["test_per_class"]}
        found = class_tasks(self.data, self.sizes["classes"], seed, part=part, **limits)
        return found[: self.sizes["tune_tasks"]] if part == "validation" else found

    def run(self, method: str, options: Options, part: str, seed: int) -> Row:
        """The result of a method, measured now unless it is there."""
        name = {"set": self.data.name, "model": self.name, "method": method, "options": options, "part": part}
        name |= {"seed": seed, "sizes": self.sizes, "layers": self.layers, "blocks": self.blocks}
        name |= {"greedy": self.greedy, "max_tokens": self.prompts.max_tokens}
        return self.results.get(name, lambda: self._run(method, options, part, seed))

    def _run(self, method: str, options: Options, part: str, seed: int) -> Row:
        tasks = self.tasks(part, seed)
        if METHODS[method].kept == "joint":
            tasks = joined(tasks, seed)
        features = TextFeatures(self.model, self.prompts, self.layers, self.cache)
        start = time.perf_counter()
        features.prepare([x.text for task in tasks for x in (*task.train, *task.test)])
        features.frozen = True
        prepared = time.perf_counter()
        result = self._measure(METHODS[method].build(self._setup(features, tasks, seed), options), tasks)
        result["seconds"] = round(time.perf_counter() - prepared, 1)
        result["feature_seconds"] = round(prepared - start, 1)
        result["hardware"] = hardware(self.model.device)
        told = f"final {result['final']:.3f}, forgetting {result['forgetting']:.3f} in {result['seconds']:.0f} s"
        print(f"{self.data.name} {part} seed {seed} {method} {options or ''}: {told}", flush=True)
        return result

    def measure(self, method: str, options: Options, seed: int, every: int) -> None:
        """The levels' measures while a method learns the test stream, unless they are there; nothing is asked."""
        name = {"set": self.data.name, "model": self.name, "method": method, "options": options, "part": "measures"}
        name |= {"seed": seed, "sizes": self.sizes, "blocks": self.blocks, "every": every}
        self.results.get(name, lambda: self._record(method, options, seed, every))

    def _record(self, method: str, options: Options, seed: int, every: int) -> Row:
        features = TextFeatures(self.model, self.prompts, self.layers, self.cache)
        tasks = self.tasks("test", seed)
        setup = self._setup(features, tasks, seed)
        learner = METHODS[method].build(setup, options)
        levels = learner.levels if isinstance(learner, LevelsWithMemory) else learner
        assert isinstance(levels, TrainedClassifier) and isinstance(levels.optimizer, MultiFrequency)
        known = {id(p): name for name, p in setup.model.named_parameters()}
        names = {level.name: [known[id(p)] for p in level.parameters] for level in levels.optimizer.levels}
        records = record_levels(setup.model, names, levels.optimizer, every)
        for task in tasks:
            levels.learn(task)
        return {"measures": records, "hardware": hardware(self.model.device)}

    def _setup(self, features: TextFeatures, tasks: list[ClassTask], seed: int) -> Setup:
        """What a method is made of; random numbers begin anew."""
        classes = sum(len(task.classes) for task in tasks)
        buffers = (classes, 3 * classes)
        torch.manual_seed(seed)
        return Setup(copy.deepcopy(self.model), self.prompts, features, self.blocks, buffers, seed, self.greedy)

    def _measure(self, learner: ClassLearner, tasks: list[ClassTask]) -> Row:
        try:
            result = run_class_incremental(learner, tasks)
        except ArithmeticError:  # a rate or strength of the grid that is too high
            return {"final": 0.0, "average": 0.0, "forgetting": 0.0, "diverged": True}
        return result.to_json() | {"diverged": False}

    def chosen(self, method: str) -> Options:
        """The settings with the highest accuracy at the end of the validation stream; of equals, on the way there.

        Where the best has the smallest or largest value of a setting, the next one is tried, the others as they are,
        until none is better.
        """

        def quality(options: Options) -> tuple[float, float]:
            row = self.run(method, options, "validation", VALIDATION_SEED)
            return -row["final"], -row["average"]

        if len(METHODS[method].grid) == 1:
            return METHODS[method].grid[0]
        return dict(grow(quality, METHODS[method].grid, neighbour).best)


def neighbour(name: str, values: Sequence[float], up: bool) -> float | None:
    """As many times larger than the largest as that is than the next (or smaller, likewise), in 1, 3, 10, 30, ... where
    the steps are those. Shares stay below 1."""
    ratio = values[-1] / values[-2] if up else values[0] / values[1]
    edge = values[-1 if up else 0]
    new = edge * ratio if max(ratio, 1 / ratio) > 10 else next_rate(edge, up)
    return None if name == "shrinkage" and new >= 1 else new


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Every method on a tiny random model."""
    data = synthetic_set(6, 12)
    prompts = LabelPrompts(byte_tokenizer(), data.labels)
    sizes = {"classes": 2, "per_class": 6, "test_per_class": 2, "tune_tasks": 2}
    made = Experiment(data, tiny_llama(4, args.device), "tiny", prompts, sizes, [1], 3, args.folder, rows)
    for method in METHODS:
        made.run(method, METHODS[method].grid[0], "test", 0)
    made.measure("levels_memory", METHODS["levels_memory"].grid[0], 0, 2)
    made.chosen("memory")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The set, the model, the methods."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--set", choices=list(READERS))
    source.add_argument("--csv", type=Path, help="any set with the columns text and label")
    parser.add_argument("--data", type=Path, help="folder of --set")
    parser.add_argument("--model", help="Hugging Face folder or name, or a GGUF file")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--classes", type=int, default=15, help="of a task")
    parser.add_argument("--per-class", type=int, default=10, help="training texts")
    parser.add_argument("--test-per-class", type=int, default=3)
    parser.add_argument("--tune-tasks", type=int, default=4, help="tasks of the validation stream")
    parser.add_argument("--layers", nargs="*", type=int, help="whose states are features (default: at 27%% and 40%%)")
    parser.add_argument("--blocks", type=int, help="from the top, that hold levels (default: the upper third)")
    parser.add_argument("--max-tokens", type=int, default=48, help="of a text")
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    parser.add_argument("--greedy", action="store_true", help="answer by greedy descent: cheaper with many labels")
    parser.add_argument("--measures", type=int, metavar="N", help="measure the levels every N steps, in a pass more")
    add_machine_arguments(parser)


def check_blocks(methods: list[str], blocks: int, depth: int) -> None:
    """Every level of the methods with several needs a block of its own.

    Raises:
        SystemExit: blocks that the model has not, or fewer than levels.
    """
    if blocks > depth:
        raise SystemExit(f"--blocks {blocks}: the model has {depth} layers; give at most so many")
    needing = [method for method in methods if method.startswith("levels")]
    if not needing or blocks >= len(PERIODS):
        return
    least = len(PERIODS)
    raise SystemExit(
        f"{', '.join(needing)}: {least} levels need at least {least} blocks, and {blocks} of the model's {depth} "
        f"layers hold levels; give --blocks {least} or more (a model of at least {least} layers), or other --methods"
    )


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Settings by validation, then all methods and seeds."""
    if args.model is None or (args.csv is None and (args.set is None or args.data is None)):
        raise SystemExit("--model PATH and either --csv FILE or --set NAME --data DIR are needed (or --quick)")
    use_machine(args)
    data = read_csv(args.csv) if args.csv else READERS[args.set](args.data)
    model, tokenizer = load_pretrained(args.model)
    model.to(args.device)
    depth = model.config.num_hidden_layers
    blocks = args.blocks or math.ceil(depth / 3)
    check_blocks(args.methods, blocks, depth)
    sizes = {name: getattr(args, name) for name in ("classes", "per_class", "test_per_class", "tune_tasks")}
    layers = args.layers or [round(0.27 * depth), round(0.4 * depth)]
    prompts = LabelPrompts(tokenizer, data.labels, args.max_tokens)
    name = Path(args.model).name
    made = Experiment(data, model, name, prompts, sizes, layers, blocks, args.cache, rows, args.greedy)
    for method in args.methods:
        options = made.chosen(method)
        for seed in args.seeds:
            made.run(method, options, "test", seed)
        if args.measures and args.seeds and method.startswith("levels"):
            made.measure(method, options, args.seeds[0], args.measures)


REPRODUCTION = Reproduction(run, make_report, quick, arguments)
