"""Class-incremental methods that train the model: in sequence, LoRA, EWC, replay, levels, levels with a memory."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from nestling.continual.replay.reservoir import Reservoir, ReservoirItem
from nestling.evaluation.class_incremental.classifiers import MemoryClassifier, trie_scores
from nestling.evaluation.class_incremental.ewc import ElasticWeightConsolidation
from nestling.evaluation.class_incremental.label_trie import LabelScorer, answer_loss
from nestling.evaluation.class_incremental.prompts import LabelPrompts
from nestling.models.conversion import assign_neurons
from nestling.optim.multi_frequency import MultiFrequency
from nestling.optim.optimizer_level import OptimizerLevel
from nestling.tasks.classification import ClassTask, LabelledText

Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class TrainingSettings:
    """How `TrainedClassifier` learns.

    Attributes:
        batch: new texts in a step.
        replayed: texts from the buffer in a step, if there is a buffer.
        clip: largest norm of a step's gradient.
        fisher_texts: of a task, for EWC.
        seed: of the choice of those.
        greedy: answer by greedy descent in the label trie, not by the exact best label: several times cheaper with
            many labels.
    """

    batch: int = 8
    replayed: int = 8
    clip: float = 1.0
    fisher_texts: int = 32
    seed: int = 0
    greedy: bool = False


class TrainedClassifier:
    """A language model that learns to continue a text with its label, one pass, batch after batch.

    Every method of this kind is a choice of what the optimizer holds and of what holds it back: full fine-tuning, LoRA
    (`add_lora`), EWC (`penalty`), replay (`buffer`), levels (`levels_optimizer`).

    Args:
        scorer: of the model, which is trained in place.
        prompts: of the model.
        optimizer: over the parameters that learn; all others are frozen by this constructor.
        settings: see there.
        buffer: for experience replay.
        penalty: for EWC.
    """

    def __init__(
        self,
        scorer: LabelScorer,
        prompts: LabelPrompts,
        optimizer: Optimizer,
        settings: TrainingSettings | None = None,
        *,
        buffer: Reservoir | None = None,
        penalty: ElasticWeightConsolidation | None = None,
    ) -> None:
        self.scorer, self.prompts, self.optimizer = scorer, prompts, optimizer
        self.settings = settings or TrainingSettings()
        self.buffer, self.penalty = buffer, penalty
        self.parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        learning = {id(p) for p in self.parameters}
        for parameter in scorer.model.parameters():
            parameter.requires_grad_(id(parameter) in learning)
        self.random = random.Random(self.settings.seed)
        self.seen: list[int] = []

    def learn(self, task: ClassTask) -> None:
        """One pass over the task's texts."""
        self.seen.extend(task.classes)
        pairs = [(self.prompts.question(x.text), self.prompts.answers[x.label]) for x in task.train]
        size = self.settings.batch
        for first in range(0, len(pairs), size):
            new = pairs[first : first + size]
            self._step(new + self._replayed())
            self._remember(new, task.train[first : first + size])
        if self.penalty is not None:
            some = self.random.sample(pairs, min(self.settings.fisher_texts, len(pairs)))
            self.penalty.consolidate(self._losses(some))

    def predict(self, texts: Sequence[str]) -> list[int]:
        """The most probable label of all classes seen."""
        find = self.scorer.greedy if self.settings.greedy else self.scorer.best
        return find([self.prompts.question(t) for t in texts], self.prompts.trie(self.seen))

    def _step(self, pairs: Sequence[Pair]) -> None:
        self.optimizer.zero_grad()
        loss = answer_loss(self.scorer.model, [p for p, _ in pairs], [a for _, a in pairs], self.scorer.pad)
        if not torch.isfinite(loss):
            raise FloatingPointError("the loss is not finite: the learning rate is too high")
        loss.backward()
        if self.penalty is not None:
            self.penalty.add_gradient()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()

    def _losses(self, pairs: Sequence[Pair]) -> Iterator[Tensor]:
        for prompt, answer in pairs:
            yield answer_loss(self.scorer.model, [prompt], [answer], self.scorer.pad)

    def _replayed(self) -> list[Pair]:
        if self.buffer is None:
            return []
        return [_pair(item) for item in self.buffer.sample(self.settings.replayed)]

    def _remember(self, pairs: Sequence[Pair], examples: Sequence[LabelledText]) -> None:
        if self.buffer is not None:
            for (prompt, answer), example in zip(pairs, examples, strict=True):
                self.buffer.add(torch.tensor(prompt + answer), {"prompt": len(prompt), "label": example.label})


class LevelsWithMemory:
    """Levels and an associative memory: what is new is known at once, and what it means is learned slowly.

    The fastest level is an `AssociativeMemory` M over keys k(x) from below the blocks that learn; its objective is
    solved exactly after every text. The other levels are MLPs with periods of their own (NL Eq. 71), trained on the
    label's log-likelihood. The answer is the label that both support:

        argmax_{c in top(M k(x))}  log p_theta(c | x) + weight * (M k(x))_c

    The memory does not forget and its keys do not drift (the blocks below the levels stand still), but it is linear;
    the levels are not, but move on. The read biases the label trie, and it narrows the choice to the classes the memory
    thinks possible, so that a language model that prefers recent labels cannot give one that nothing speaks for. No
    text is kept.

    Args:
        levels: the model with its levels.
        memory: over its own features.
        candidates: classes left to the choice.
        weight: nats for a read of 1.
    """

    def __init__(
        self, levels: TrainedClassifier, memory: MemoryClassifier, candidates: int = 5, weight: float = 10.0
    ) -> None:
        self.levels, self.memory, self.count, self.weight = levels, memory, candidates, weight

    def learn(self, task: ClassTask) -> None:
        """The memory writes, the levels step."""
        self.memory.learn(task)
        self.levels.learn(task)

    def predict(self, texts: Sequence[str]) -> list[int]:
        """The label of the highest sum."""
        chosen = self.memory.candidates(texts, self.count)
        spoken = trie_scores(self.levels.scorer, self.levels.prompts, texts, [classes for classes, _ in chosen])
        totals = [row + self.weight * reads for row, (_, reads) in zip(spoken, chosen, strict=True)]
        return [classes[int(total.argmax())] for total, (classes, _) in zip(totals, chosen, strict=True)]


def levels_optimizer(model: PreTrainedModel, periods: Sequence[int], lr: float, blocks: int) -> MultiFrequency:
    """AdamW over the MLPs of the last blocks, in levels by depth, the topmost the fastest, rates lr * period^-0.5.

    Args:
        model: with `model.layers[i].mlp`, as transformers' Llama family has it.
        periods: of each level in steps, fastest first. Topmost fastest and this rate were best in a first trial
            on text: slow levels at the top were worse than one level.
        lr: of a level of period 1.
        blocks: how many blocks learn, shared out as `convert` does it by depth.

    Raises:
        ValueError: fewer blocks than levels, or more than the model has.
    """
    layers = list(model.get_decoder().layers)
    if not len(periods) <= blocks <= len(layers):
        raise ValueError(f"blocks lies between {len(periods)} (the levels) and {len(layers)} (the model), not {blocks}")
    names = {f"period {period}": period for period in periods}
    shares = assign_neurons(blocks, model.config.intermediate_size, tuple(names), "depth")
    levels: Mapping[str, OptimizerLevel] = {
        name: OptimizerLevel(
            [
                p
                for block, share in zip(layers[-blocks:], shares, strict=True)
                if name in share
                for p in block.mlp.parameters()
            ],
            period,
        )
        for name, period in names.items()
    }
    return MultiFrequency(levels, optimizer=partial(AdamW, lr=lr, weight_decay=0.0), rate_exponent=-0.5)


def _pair(item: ReservoirItem) -> Pair:
    cut = item.metadata["prompt"]
    return item.tokens[:cut].tolist(), item.tokens[cut:].tolist()
