"""Class-incremental methods that leave the model as it is: in context, by retrieval, with an external learner."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nestling.evaluation.class_incremental.features import TextFeatures
from nestling.evaluation.class_incremental.label_trie import LabelScorer, LabelTrie
from nestling.evaluation.class_incremental.prompts import LabelPrompts
from nestling.tasks.classification import ClassTask, LabelledText


class KeyMemory(Protocol):
    """What `class_memory` offers."""

    classes: list[int]

    def write(self, keys: Tensor, labels: Tensor) -> None:
        """Add examples."""

    def scores(self, keys: Tensor) -> Tensor:
        """`[n, classes]`; the highest is the answer."""


class Keys:
    """Features brought to mean 0 and mean square 1 in every dimension by the statistics of the first task's texts.

    Those stay as they are: keys written early and read late must be the same map of a text.
    """

    def __init__(self, features: TextFeatures) -> None:
        self.features = features
        self.shift: Tensor | None = None
        self.scale: Tensor | None = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """`[n, width]`, float64. The first call, with two texts or more, sets the statistics."""
        found = self.features(texts).double()
        if self.shift is None or self.scale is None:
            self.shift, self.scale = found.mean(0), found.std(0).clamp(min=1e-6)
        return (found - self.shift) / self.scale


class MemoryClassifier:
    """A memory of classes over the model's features; the language model is not asked.

    Args:
        keys: of texts.
        memory: `ClassMeans` or `AssociativeMemory`.
    """

    def __init__(self, keys: Keys, memory: KeyMemory) -> None:
        self.keys, self.memory = keys, memory

    def learn(self, task: ClassTask) -> None:
        """Write the task's texts."""
        labels = torch.tensor([example.label for example in task.train])
        self.memory.write(self.keys([example.text for example in task.train]), labels)

    def predict(self, texts: Sequence[str]) -> list[int]:
        """The class of the highest score."""
        return [classes[0] for classes, _ in self.candidates(texts, 1)]

    def candidates(self, texts: Sequence[str], count: int) -> list[tuple[list[int], Tensor]]:
        """For every text the `count` classes of the highest scores, the highest first, and these scores."""
        scores = self.memory.scores(self.keys(texts))
        top = scores.topk(min(count, scores.shape[1]), -1)
        return [
            ([self.memory.classes[i] for i in row.tolist()], s) for row, s in zip(top.indices, top.values, strict=True)
        ]


class InContext:
    """The frozen model with as many examples before the question as fit.

    One example of every class in random order, then a second one, and so on while they fit; the answer is the most
    probable label of all classes seen.

    Args:
        scorer, prompts: of the model.
        context_tokens: at most, for the examples. They are read once for all questions.
        seed: of the order.
        greedy: answer by greedy descent in the label trie.
    """

    def __init__(
        self,
        scorer: LabelScorer,
        prompts: LabelPrompts,
        context_tokens: int = 1024,
        seed: int = 0,
        greedy: bool = False,
    ) -> None:
        self.scorer, self.prompts, self.context_tokens, self.greedy = scorer, prompts, context_tokens, greedy
        self.random = random.Random(seed)
        self.texts: dict[int, list[LabelledText]] = {}

    def learn(self, task: ClassTask) -> None:
        """Keep all texts."""
        for example in task.train:
            self.texts.setdefault(example.label, []).append(example)

    def predict(self, texts: Sequence[str]) -> list[int]:
        """The label after the examples."""
        prefix = self.prompts.context(self._fitting())
        find = self.scorer.greedy if self.greedy else self.scorer.best
        return find([self.prompts.prompt(t) for t in texts], self.prompts.trie(self.texts), prefix)

    def _fitting(self) -> list[LabelledText]:
        chosen: list[LabelledText] = []
        room = self.context_tokens
        for turn in range(max(map(len, self.texts.values()))):
            classes = [c for c, own in self.texts.items() if len(own) > turn]
            self.random.shuffle(classes)
            for c in classes:
                room -= len(self.prompts.example(self.texts[c][turn]))
                if room < 0:
                    return chosen
                chosen.append(self.texts[c][turn])
        return chosen


class CandidateReader:
    """Asks the frozen model to choose between a few classes, with an example of each or several before the question.

    What was asked once is not asked again: an answer depends only on the text, the examples and the candidates.
    """

    def __init__(self, scorer: LabelScorer, prompts: LabelPrompts) -> None:
        self.scorer, self.prompts = scorer, prompts
        self.known: dict[tuple[int, ...], int] = {}

    def answer(self, texts: Sequence[str], shown: Sequence[Sequence[LabelledText]]) -> list[int]:
        """The most probable of the shown examples' labels, exactly.

        Args:
            texts: what is asked.
            shown: examples for each, in the order they are read in.
        """
        rows = [(*self.prompts.context(s), *self.prompts.prompt(t)) for t, s in zip(texts, shown, strict=True)]
        new = [i for i, row in enumerate(rows) if row not in self.known]
        tries = [self.prompts.trie(dict.fromkeys(x.label for x in shown[i])) for i in new]
        for i, label in zip(new, self.scorer.best([rows[i] for i in new], tries), strict=True):
            self.known[rows[i]] = label
        return [self.known[row] for row in rows]


class Retrieval:
    """The frozen model with the nearest examples before the question, the nearest last; all texts are kept.

    It answers with one of the labels it is shown. Nearness is the cosine of the keys.

    Args:
        keys: of texts.
        reader: of the model.
        neighbours: examples shown.
    """

    def __init__(self, keys: Keys, reader: CandidateReader, neighbours: int = 5) -> None:
        self.keys, self.reader, self.neighbours = keys, reader, neighbours
        self.examples: list[LabelledText] = []

    def learn(self, task: ClassTask) -> None:
        """Keep all texts."""
        if not self.examples:
            self.keys([example.text for example in task.train])
        self.examples.extend(task.train)

    def predict(self, texts: Sequence[str]) -> list[int]:
        """The most probable label among the nearest examples'."""
        stored = torch.nn.functional.normalize(self.keys([e.text for e in self.examples]), dim=-1)
        asked = torch.nn.functional.normalize(self.keys(texts), dim=-1)
        near = (asked @ stored.mT).topk(min(self.neighbours, len(stored)), -1).indices.flip(-1)
        return self.reader.answer(texts, [[self.examples[i] for i in row] for row in near.tolist()])


class ExternalLearner:
    """InCA (Momeni et al. 2025): class means narrow the choice to a few classes, the model decides in context.

    InCA describes a class by a summary that a large model wrote; a small model cannot write one, so the first text of
    the class stands for it. That is one text kept for each class.

    Args:
        means: the external learner.
        reader: of the model.
        candidates: classes it leaves to the model (InCA: 3).
    """

    def __init__(self, means: MemoryClassifier, reader: CandidateReader, candidates: int = 3) -> None:
        self.means, self.reader, self.count = means, reader, candidates
        self.described: dict[int, LabelledText] = {}

    def learn(self, task: ClassTask) -> None:
        """Update the means, and keep a text of each class."""
        self.means.learn(task)
        for example in task.train:
            self.described.setdefault(example.label, example)

    def predict(self, texts: Sequence[str]) -> list[int]:
        """The most probable of the nearest classes, the nearest one read last."""
        chosen = [classes[::-1] for classes, _ in self.means.candidates(texts, self.count)]
        return self.reader.answer(texts, [[self.described[c] for c in classes] for classes in chosen])


def trie_scores(
    scorer: LabelScorer, prompts: LabelPrompts, texts: Sequence[str], candidates: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The model's log-probabilities in nats of each text's own candidates, in their order; no examples are shown."""
    tries: list[LabelTrie] = [prompts.trie(classes) for classes in candidates]
    return scorer.scores([prompts.question(text) for text in texts], tries)
