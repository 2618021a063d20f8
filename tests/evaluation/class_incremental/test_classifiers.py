"""Methods that leave the model as it is, on cases with a known answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.evaluation.class_incremental.class_memory import AssociativeMemory, ClassMeans
from nestling.evaluation.class_incremental.classifiers import (
    CandidateReader,
    ExternalLearner,
    InContext,
    Keys,
    MemoryClassifier,
    Retrieval,
)
from nestling.evaluation.class_incremental.features import TextFeatures
from nestling.evaluation.class_incremental.label_trie import LabelScorer
from nestling.evaluation.class_incremental.protocol import run_class_incremental
from nestling.tasks.classification import class_tasks, synthetic_set
from tests.evaluation.class_incremental.models import byte_prompts, tiny_llama

DATA = synthetic_set(6, 15)
TASKS = class_tasks(DATA, 2, 0)
WORDS = sorted({word for x in (*DATA.train, *DATA.validation, *DATA.test) for word in x.text.split()})


class BagOfWords:
    """Counts of words: the classes of the synthetic set are told apart by them exactly."""

    width = len(WORDS)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(text.split().count(word)) for word in WORDS] for text in texts])


def keys() -> Any:
    made: Any = Keys(BagOfWords())  # type: ignore[arg-type]
    made.shift, made.scale = torch.zeros(len(WORDS)), torch.ones(len(WORDS))
    return made


@pytest.mark.parametrize(
    "memory",
    [
        ClassMeans(len(WORDS)),
        ClassMeans(len(WORDS), "euclidean"),
        AssociativeMemory(len(WORDS), 0.1),
        AssociativeMemory(len(WORDS), 0.1, expansion=200),
    ],
)
def test_memories_know_all_classes(memory: Any) -> None:
    result = run_class_incremental(MemoryClassifier(keys(), memory), TASKS)
    assert result.seen == [1.0, 1.0, 1.0] and result.forgetting == 0.0


def test_candidates_are_the_best_first() -> None:
    method = MemoryClassifier(keys(), AssociativeMemory(len(WORDS), 0.1))
    for task in TASKS:
        method.learn(task)
    texts = [x.text for x in TASKS[1].test]
    scores = method.memory.scores(method.keys(texts))
    for (classes, found), row in zip(method.candidates(texts, 3), scores, strict=True):
        order = row.argsort(descending=True)[:3]
        assert classes == [method.memory.classes[i] for i in order] and found.tolist() == row[order].tolist()
    assert len(method.candidates(texts, 99)[0][0]) == 6


class Copies(LabelScorer):
    """Answers with the label of the last example read: what is shown decides."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(1, 1))
        self.asked = 0

    def best(self, prompts: Sequence[Sequence[int]], tries: Any, prefix: Sequence[int] = ()) -> list[int]:
        self.asked += len(prompts)
        found = []
        for prompt, trie in zip(prompts, tries, strict=True):
            text = bytes(token - 3 for token in prompt if token > 2).decode()
            last = text.split("Label: ")[-1].split("\n")[0]
            found.append(DATA.labels.index(last))
            assert found[-1] in trie.classes
        return found


def test_retrieval_shows_the_nearest_last_and_asks_once() -> None:
    scorer = Copies()
    method = Retrieval(keys(), CandidateReader(scorer, byte_prompts(DATA)), 3)
    run_class_incremental(method, TASKS)
    asked, count = [x.text for task in TASKS for x in task.test], scorer.asked
    stored = [x for task in TASKS for x in task.train]
    vectors = torch.nn.functional.normalize(BagOfWords()([x.text for x in stored]), dim=-1)
    for text, label in zip(asked, method.predict(asked), strict=True):
        near = vectors @ torch.nn.functional.normalize(BagOfWords()([text]), dim=-1)[0]
        assert label in {x.label for x, s in zip(stored, near, strict=True) if s > near.max() - 1e-6}
    assert scorer.asked == count


def test_external_learner_leaves_the_choice_to_the_model() -> None:
    scorer = Copies()
    means = MemoryClassifier(keys(), ClassMeans(len(WORDS)))
    method = ExternalLearner(means, CandidateReader(scorer, byte_prompts(DATA)), 3)
    assert run_class_incremental(method, TASKS).seen == [1.0, 1.0, 1.0]
    assert {c: x.label for c, x in method.described.items()} == {c: c for task in TASKS for c in task.classes}
    first = TASKS[0].train[0]
    assert method.described[first.label] == first


def test_in_context_reads_what_fits() -> None:
    prompts = byte_prompts(DATA)

    prefixes: list[list[int]] = []

    class Spy(LabelScorer):
        def best(self, prompts: Any, tries: Any, prefix: Sequence[int] = ()) -> list[int]:
            prefixes.append(list(prefix))
            return [tries.classes[-1]] * len(prompts)

    room = 300
    run_class_incremental(InContext(Spy(torch.nn.Linear(1, 1)), prompts, room), TASKS)
    for done, prefix in enumerate(prefixes, 1):
        text = bytes(token - 3 for token in prefix).decode()
        shown = [part.split("\n")[0] for part in text.split("Label: ")[1:]]
        assert room - 40 < len(prefix) <= room
        learned = {DATA.labels[c] for task in TASKS[:done] for c in task.classes}
        # One of every class before a second one of any.
        assert set(shown) <= learned and len(set(shown)) == min(len(shown), 2 * done)


def test_in_context_with_a_real_model_answers_with_classes_seen() -> None:
    method = InContext(LabelScorer(tiny_llama()), byte_prompts(DATA), 120)
    method.learn(TASKS[0])
    assert set(method.predict([x.text for x in TASKS[1].test])) <= set(TASKS[0].classes)


@pytest.mark.parametrize("greedy", [False, True])
def test_in_context_asks_greedily_or_exactly(greedy: bool) -> None:
    asked: list[str] = []

    class Spy(LabelScorer):
        def best(self, prompts: Any, tries: Any, prefix: Sequence[int] = ()) -> list[int]:
            asked.append("exactly")
            return [0] * len(prompts)

        def greedy(self, prompts: Any, trie: Any, prefix: Sequence[int] = ()) -> list[int]:
            asked.append("greedily")
            return [0] * len(prompts)

    method = InContext(Spy(torch.nn.Linear(1, 1)), byte_prompts(DATA), 120, greedy=greedy)
    method.learn(TASKS[0])
    method.predict(["rain"])
    assert asked == ["greedily" if greedy else "exactly"]


def test_features_are_means_over_the_text() -> None:
    model, prompts = tiny_llama(), byte_prompts(DATA)
    features = TextFeatures(model, prompts, (1, -1))
    texts = ["ab cd", "a longer text by far", "", "x"]
    found = features(texts)
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([prompts.question(text)]), output_hidden_states=True).hidden_states
        both = torch.cat((states[1][0], states[3][0]), -1)
        own = both[6 : 6 + min(len(text), 20)]
        torch.testing.assert_close(row, own.mean(0) if text else both[-1], rtol=1e-4, atol=1e-5)
    assert features.width == found.shape[1] == 64


def test_features_stay_on_disk_and_are_not_asked_of_a_changed_model(tmp_path: Path) -> None:
    model = tiny_llama()
    first = TextFeatures(model, byte_prompts(DATA), (2,), tmp_path)
    value = first(["ab", "cd"])
    again = TextFeatures(model, byte_prompts(DATA), (2,), tmp_path)
    again.frozen = True
    torch.testing.assert_close(again(["cd", "ab"]), value.flip(0), rtol=0, atol=0)
    with pytest.raises(ValueError, match="1 texts have no features"):
        again(["ab", "new"])
    assert not TextFeatures(model, byte_prompts(DATA), (1,), tmp_path).known
    assert not TextFeatures(tiny_llama(seed=1), byte_prompts(DATA), (2,), tmp_path).known


def test_keys_keep_the_statistics_of_the_first_task() -> None:
    made = Keys(BagOfWords())  # type: ignore[arg-type]
    first = made([x.text for x in TASKS[0].train])
    torch.testing.assert_close(first.mean(0), torch.zeros(len(WORDS)).double(), atol=1e-9, rtol=0)
    text = TASKS[0].train[0].text
    made([x.text for x in TASKS[1].train])
    torch.testing.assert_close(made([text])[0], first[0])
