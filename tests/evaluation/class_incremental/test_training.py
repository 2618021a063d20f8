"""Methods that train, on a case where what they know at the end is known beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from nestling.continual.replay.reservoir import Reservoir
from nestling.evaluation.class_incremental.class_memory import AssociativeMemory
from nestling.evaluation.class_incremental.classifiers import Keys, MemoryClassifier
from nestling.evaluation.class_incremental.ewc import ElasticWeightConsolidation
from nestling.evaluation.class_incremental.label_trie import LabelScorer, answer_loss
from nestling.evaluation.class_incremental.protocol import ClassIncrementalResult, run_class_incremental
from nestling.evaluation.class_incremental.training import (
    LevelsWithMemory,
    TrainedClassifier,
    TrainingSettings,
    levels_optimizer,
)
from nestling.tasks.classification import class_tasks, joined, synthetic_set
from reproductions.harness.lora import add_lora
from tests.evaluation.class_incremental.models import byte_prompts, tiny_llama
from tests.evaluation.class_incremental.test_classifiers import BagOfWords

DATA = synthetic_set(4, 40)
PROMPTS = byte_prompts(DATA)
TASKS = class_tasks(DATA, 1, 0, test_limit=6)  # a class a task: in sequence only the last one is left


def trained(lr: float = 1e-2, settings: TrainingSettings | None = None, **options: Any) -> TrainedClassifier:
    model = tiny_llama(2)
    settings = settings or TrainingSettings(batch=2)
    return TrainedClassifier(LabelScorer(model), PROMPTS, AdamW(model.parameters(), lr), settings, **options)


def run(method: Any, tasks: Any = TASKS) -> ClassIncrementalResult:
    return run_class_incremental(method, tasks)


def test_in_sequence_the_last_class_is_left_and_a_full_buffer_keeps_more() -> None:
    alone = run(trained())
    assert alone.seen == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4]) and alone.forgetting == 1.0
    replayed = run(trained(settings=TrainingSettings(batch=2, replayed=16), buffer=Reservoir(1000)))
    assert replayed.seen[-1] > 0.5 and replayed.forgetting < 0.5


@pytest.mark.parametrize("greedy", [False, True])
def test_answers_greedily_or_exactly(greedy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    method = trained(settings=TrainingSettings(greedy=greedy))
    method.seen = [0]
    for name in ("best", "greedy"):
        monkeypatch.setattr(method.scorer, name, lambda prompts, trie, name=name: [name] * len(prompts))
    assert method.predict(["rain"]) == ["greedy" if greedy else "best"]


def test_joint_training_is_not_of_the_last_class() -> None:
    tasks = class_tasks(synthetic_set(4, 200), 1, 0, test_limit=6)
    assert run(trained(3e-3, TrainingSettings(batch=4)), joined(tasks)).seen[-1] > 0.6


def test_the_buffer_holds_what_was_learned_from() -> None:
    buffer = Reservoir(1000)
    method = trained(buffer=buffer)
    method.learn(TASKS[0])
    assert len(buffer) == len(TASKS[0].train)
    first = TASKS[0].train[0]
    question, answer = PROMPTS.question(first.text), PROMPTS.answers[first.label]
    assert buffer.items[0].tokens.tolist() == question + answer
    assert buffer.items[0].metadata == {"prompt": len(question), "label": first.label}


def moved(method: TrainedClassifier, weights: dict[str, torch.Tensor] | None = None) -> float:
    """Squared distance that the second task takes the parameters, weighted."""
    start = {n: p.detach().clone() for n, p in method.scorer.model.named_parameters()}
    method.learn(TASKS[1])
    apart = {n: (p.detach() - start[n]).square() for n, p in method.scorer.model.named_parameters()}
    return sum(float((d * weights[n] if weights else d).sum()) for n, d in apart.items())


def test_a_penalty_holds_what_mattered() -> None:
    def held(strength: float) -> float:
        method = trained(settings=TrainingSettings(batch=2, clip=1e9))
        model = method.scorer.model
        # SGD, since Adam's steps do not grow with the gradient.
        method.optimizer = SGD(model.parameters(), 1e-3)
        method.penalty = ElasticWeightConsolidation(dict(model.named_parameters()), strength)
        method.learn(TASKS[0])
        return moved(method, {n: f.clone() for n, f in method.penalty.fisher.items()})

    assert held(100.0) < 0.7 * held(0.0)


def test_a_step_is_the_optimizers_on_the_batch() -> None:
    method, model = trained(3e-3, settings=TrainingSettings(batch=5, clip=1e9)), tiny_llama(2)
    optimizer = AdamW(model.parameters(), 3e-3)
    for first in range(0, len(TASKS[0].train), 5):
        part = TASKS[0].train[first : first + 5]
        optimizer.zero_grad()
        answer_loss(
            model, [PROMPTS.question(x.text) for x in part], [PROMPTS.answers[x.label] for x in part]
        ).backward()
        optimizer.step()
    method.learn(TASKS[0])
    for p, q in zip(method.scorer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_lora_trains_its_updates_alone() -> None:
    model = tiny_llama(2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = add_lora(model, 4)
    learning = [p for p in wrapped.parameters() if p.requires_grad]
    method = TrainedClassifier(LabelScorer(wrapped), PROMPTS, AdamW(learning, 1e-2))
    example = TASKS[0].test[0]
    asked = [PROMPTS.question(example.text)], [PROMPTS.answers[example.label]]
    loss = float(answer_loss(wrapped, *asked).detach())
    method.learn(TASKS[0])
    assert float(answer_loss(wrapped, *asked).detach()) < 0.8 * loss
    for name, p in wrapped.named_parameters():
        if "lora" not in name:
            plain = name.replace(".base_layer", "")
            torch.testing.assert_close(p, before[plain], rtol=0, atol=0)
    assert method.predict([example.text]) == [example.label]


def test_levels_have_their_blocks_periods_and_rates() -> None:
    model = tiny_llama(7)
    optimizer = levels_optimizer(model, (1, 4, 16), 1e-2, 5)
    own = [{id(p) for p in block.mlp.parameters()} for block in model.model.layers]
    found = [{id(p) for p in level.parameters} for level in optimizer.levels]
    assert found == [own[6] | own[5], own[4] | own[3], own[2]]
    assert [level.period for level in optimizer.levels] == [1, 4, 16]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2, 5e-3, 2.5e-3])
    with pytest.raises(ValueError, match="blocks"):
        levels_optimizer(model, (1, 4), 1e-2, 8)
    with pytest.raises(ValueError, match="blocks"):
        levels_optimizer(model, (1, 4), 1e-2, 1)


def test_only_the_levels_learn_and_keys_below_them_stand_still() -> None:
    model = tiny_llama(4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = TrainedClassifier(LabelScorer(model), PROMPTS, levels_optimizer(model, (1, 2), 1e-2, 2))
    tokens = torch.tensor([PROMPTS.question("abc")])
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    method.learn(TASKS[0])
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    parts = ("gate_proj", "up_proj", "down_proj")
    assert changed == {f"model.layers.{i}.mlp.{part}.weight" for i in (2, 3) for part in parts}
    with torch.no_grad():
        after = model(input_ids=tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(after[2], states[2], rtol=0, atol=0)
    assert not torch.equal(after[3], states[3])


def combined(weight: float, candidates: int, lr: float) -> LevelsWithMemory:
    model = tiny_llama(2)
    levels = TrainedClassifier(LabelScorer(model), PROMPTS, levels_optimizer(model, (1, 2), lr, 2))
    keys = Keys(BagOfWordsOfFour())  # type: ignore[arg-type]
    return LevelsWithMemory(
        levels, MemoryClassifier(keys, AssociativeMemory(keys.features.width, 0.1)), candidates, weight
    )


WORDS = sorted({word for x in (*DATA.train, *DATA.test) for word in x.text.split()})


class BagOfWordsOfFour(BagOfWords):
    """Of the words of this file's set."""

    width = len(WORDS)

    def __call__(self, texts: Any) -> torch.Tensor:
        return torch.tensor([[float(text.split().count(word)) for word in WORDS] for text in texts])


def test_the_memory_rules_at_a_high_weight_and_the_levels_at_none() -> None:
    assert run(combined(1e6, 4, 3e-3)).seen[-1] == 1.0
    assert run(combined(0.0, 4, 3e-2)).seen[-1] == pytest.approx(1 / 4)  # as the levels alone: the last class
    assert run(combined(0.0, 1, 3e-2)).seen[-1] == 1.0  # one candidate leaves the levels no choice


def test_the_sum_is_what_the_docstring_says() -> None:
    method = combined(3.0, 2, 3e-3)
    for task in TASKS:
        method.learn(task)
    texts = [x.text for task in TASKS for x in task.test]
    trie = PROMPTS.trie(range(4))
    spoken = method.levels.scorer.scores([PROMPTS.question(t) for t in texts], trie)
    reads = method.memory.memory.scores(method.memory.keys(texts))[
        :, [method.memory.memory.classes.index(c) for c in range(4)]
    ]
    totals = torch.stack(spoken) + 3.0 * reads
    totals[reads < reads.topk(2).values[:, -1:]] = -torch.inf
    assert method.predict(texts) == totals.argmax(-1).tolist()


def test_a_loss_that_is_not_finite_stops() -> None:
    method = trained()
    with torch.no_grad():
        next(iter(method.scorer.model.parameters())).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="learning rate"):
        method.learn(TASKS[0])
