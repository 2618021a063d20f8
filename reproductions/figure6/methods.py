"""The methods of this comparison, each with the settings that validation chooses from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch.optim import AdamW
from transformers import PreTrainedModel

from nestling.continual.replay.reservoir import Reservoir
from nestling.evaluation.class_incremental.class_memory import AssociativeMemory, ClassMeans
from nestling.evaluation.class_incremental.classifiers import (
    CandidateReader,
    ExternalLearner,
    InContext,
    Keys,
    MemoryClassifier,
    Retrieval,
)
from nestling.evaluation.class_incremental.ewc import ElasticWeightConsolidation
from nestling.evaluation.class_incremental.features import TextFeatures
from nestling.evaluation.class_incremental.label_trie import LabelScorer
from nestling.evaluation.class_incremental.prompts import LabelPrompts
from nestling.evaluation.class_incremental.protocol import ClassLearner
from nestling.evaluation.class_incremental.training import (
    LevelsWithMemory,
    TrainedClassifier,
    TrainingSettings,
    levels_optimizer,
)
from nestling.tasks.classification import ClassTask
from reproductions.harness.lora import add_lora

Options = dict[str, float]
PERIODS = (1, 4, 16)


@dataclass
class Setup:
    """What a method is made of.

    Attributes:
        model: a fresh copy of the pre-trained one; a method may train it.
        prompts, features: of the pre-trained one.
        blocks: how many blocks from the top hold levels.
        buffers: sizes of the smaller and the larger replay buffer, in texts.
        seed: of everything a method draws.
        greedy: how methods that answer with the language model over all classes find the label.
    """

    model: PreTrainedModel
    prompts: LabelPrompts
    features: TextFeatures
    blocks: int
    buffers: tuple[int, int]
    seed: int
    greedy: bool = False

    @property
    def scorer(self) -> LabelScorer:
        """Of the model."""
        return LabelScorer(self.model)


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        build: makes it from a setup and one of `grid`.
        kept: texts it stores: "none", "one a class", "all", "buffer"; "joint" sees all at once.
        grid: settings that validation chooses from, and beyond where the best is at its edge; a single one needs no
            validation.
    """

    build: Callable[[Setup, Options], ClassLearner]
    kept: Literal["none", "one a class", "all", "buffer", "joint"]
    grid: Sequence[Options] = field(default=({},))


class Untrained:
    """A language model that stays as it is, where `LevelsWithMemory` expects one that learns."""

    def __init__(self, setup: Setup) -> None:
        self.scorer, self.prompts = setup.scorer, setup.prompts

    def learn(self, task: ClassTask) -> None:
        """Nothing."""


def _in_context(setup: Setup, options: Options) -> ClassLearner:
    return InContext(setup.scorer, setup.prompts, seed=setup.seed, greedy=setup.greedy)


def _reader(setup: Setup) -> CandidateReader:
    return CandidateReader(setup.scorer, setup.prompts)


def _retrieval(setup: Setup, options: Options) -> ClassLearner:
    return Retrieval(Keys(setup.features), _reader(setup), 5)


def _nearest_mean(setup: Setup, options: Options) -> ClassLearner:
    return MemoryClassifier(Keys(setup.features), ClassMeans(setup.features.width, "euclidean"))


def _means(setup: Setup, options: Options) -> MemoryClassifier:
    means = ClassMeans(setup.features.width, "mahalanobis", options["shrinkage"])
    return MemoryClassifier(Keys(setup.features), means)


def _external(setup: Setup, options: Options) -> ClassLearner:
    return ExternalLearner(_means(setup, options), _reader(setup), 3)


def _least_squares(setup: Setup, options: Options) -> MemoryClassifier:
    expansion = int(options.get("expansion", 0))
    memory = AssociativeMemory(setup.features.width, options["ridge"], expansion=expansion, seed=setup.seed)
    return MemoryClassifier(Keys(setup.features), memory)


def _delta(setup: Setup, options: Options) -> ClassLearner:
    return MemoryClassifier(
        Keys(setup.features), AssociativeMemory(setup.features.width, rule="delta", rate=options["rate"])
    )


def _settings(setup: Setup) -> TrainingSettings:
    return TrainingSettings(seed=setup.seed, greedy=setup.greedy)


def _fine_tuning(setup: Setup, options: Options) -> TrainedClassifier:
    optimizer = AdamW(setup.model.parameters(), options["lr"], weight_decay=0.0, fused=True)
    return TrainedClassifier(setup.scorer, setup.prompts, optimizer, _settings(setup))


def _lora(setup: Setup, options: Options) -> ClassLearner:
    model = add_lora(setup.model, 8, setup.seed)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], options["lr"], weight_decay=0.0, fused=True)
    return TrainedClassifier(LabelScorer(model), setup.prompts, optimizer, _settings(setup))


def _ewc(setup: Setup, options: Options) -> ClassLearner:
    made = _fine_tuning(setup, options)
    made.penalty = ElasticWeightConsolidation(dict(setup.model.named_parameters()), options["strength"], retention=1.0)
    return made


def _replay(which: int) -> Callable[[Setup, Options], ClassLearner]:
    def build(setup: Setup, options: Options) -> ClassLearner:
        made = _fine_tuning(setup, options)
        made.buffer = Reservoir(setup.buffers[which], setup.seed)
        return made

    return build


def _levels(setup: Setup, options: Options, periods: Sequence[int] = PERIODS) -> TrainedClassifier:
    optimizer = levels_optimizer(setup.model, periods, options["lr"], setup.blocks)
    return TrainedClassifier(setup.scorer, setup.prompts, optimizer, _settings(setup))


def _levels_replay(setup: Setup, options: Options) -> ClassLearner:
    made = _levels(setup, options)
    made.buffer = Reservoir(setup.buffers[1], setup.seed)
    return made


def _with_memory(learner: TrainedClassifier, setup: Setup, options: Options) -> ClassLearner:
    return LevelsWithMemory(learner, _least_squares(setup, options), weight=options["weight"])


def _levels_memory(setup: Setup, options: Options) -> ClassLearner:
    return _with_memory(_levels(setup, options), setup, options)


def _one_level_memory(setup: Setup, options: Options) -> ClassLearner:
    return _with_memory(_levels(setup, options, (1,)), setup, options)


def _frozen_memory(setup: Setup, options: Options) -> ClassLearner:
    return _with_memory(Untrained(setup), setup, options)  # type: ignore[arg-type]


def _rates(*rates: float) -> list[Options]:
    return [{"lr": rate} for rate in rates]


def _memory_grid(rates: Sequence[float]) -> list[Options]:
    weights = (10.0, 30.0, 100.0, 300.0)
    if not rates:
        return [{"weight": weight, "ridge": RIDGE} for weight in weights]
    return [{"lr": rate, "weight": weight, "ridge": RIDGE} for rate in rates for weight in weights]


RIDGE = 300.0  # for the methods with more to choose; chosen for `memory` on validation
RIDGES = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
SHRINKAGES = [{"shrinkage": value} for value in (0.03, 0.1, 0.3, 0.6, 0.8, 0.95)]
METHODS: dict[str, Method] = {
    "in_context": Method(_in_context, "all"),
    "retrieval": Method(_retrieval, "all"),
    "nearest_mean": Method(_nearest_mean, "none"),
    "class_means": Method(_means, "none", SHRINKAGES),
    "external_learner": Method(_external, "one a class", SHRINKAGES),
    "fine_tuning": Method(_fine_tuning, "none", _rates(1e-5, 3e-5, 1e-4)),
    "lora": Method(_lora, "none", _rates(1e-4, 3e-4, 1e-3)),
    "ewc": Method(_ewc, "none", [{"lr": r, "strength": s} for r in (1e-5, 3e-5, 1e-4) for s in (1e1, 1e3, 1e5)]),
    "replay_small": Method(_replay(0), "buffer", _rates(1e-5, 3e-5, 1e-4)),
    "replay_large": Method(_replay(1), "buffer", _rates(1e-5, 3e-5, 1e-4)),
    "levels": Method(_levels, "none", _rates(3e-5, 1e-4, 3e-4)),
    "levels_replay": Method(_levels_replay, "buffer", _rates(3e-5, 1e-4, 3e-4)),
    "levels_memory": Method(_levels_memory, "none", _memory_grid((3e-5, 1e-4, 3e-4))),
    "joint": Method(_fine_tuning, "joint", _rates(1e-5, 3e-5, 1e-4, 3e-4)),
    # Parts of levels_memory.
    "memory": Method(_least_squares, "none", [{"ridge": r} for r in RIDGES]),
    "memory_wide": Method(_least_squares, "none", [{"ridge": r, "expansion": 2000.0} for r in RIDGES]),
    "memory_delta": Method(_delta, "none", [{"rate": r} for r in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)]),
    "frozen_memory": Method(_frozen_memory, "none", _memory_grid(())),
    "one_level_memory": Method(_one_level_memory, "none", _memory_grid((3e-5, 1e-4))),
}
