"""Scores of labels against one plain pass a label."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from nestling.evaluation.class_incremental import label_trie
from nestling.evaluation.class_incremental.label_trie import LabelScorer, LabelTrie, answer_loss
from tests.evaluation.class_incremental.models import tiny_llama

# Shared beginnings, one label that would begin another but for its end token (9), lengths 2 to 5.
LABELS = {3: [5, 6, 9], 0: [5, 6, 7, 9], 7: [5, 8, 9], 2: [4, 9], 5: [4, 4, 6, 7, 9]}
PROMPTS = [[11, 12, 13], [14], [15, 16, 17, 18, 19, 20], [21, 22], [23, 24, 25]]


def brute_force(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return float(sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))


@pytest.mark.parametrize("prefix", [[], [31, 32, 33, 34]])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_scores_equal_one_pass_a_label(prefix: list[int], batch: int) -> None:
    model = tiny_llama()
    scores = LabelScorer(model, batch=batch).scores(PROMPTS, LabelTrie(LABELS), prefix)
    for prompt, row in zip(PROMPTS, scores, strict=True):
        expected = [brute_force(model, prefix + prompt, answer) for answer in LABELS.values()]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_every_prompt_may_have_a_trie_of_its_own() -> None:
    model = tiny_llama()
    choices = [[3, 0], [7, 2, 5], [2], [5, 3, 0, 7], [0]]
    tries = [LabelTrie({c: LABELS[c] for c in own}) for own in choices]
    scores = LabelScorer(model, batch=3).scores(PROMPTS, tries)
    for prompt, own, row in zip(PROMPTS, choices, scores, strict=True):
        expected = [brute_force(model, prompt, LABELS[c]) for c in own]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def many_labels(seed: int) -> dict[int, list[int]]:
    """Up to 40 labels of 2 to 4 tokens of five, and an end token (9)."""
    draw = random.Random(seed)
    made = {tuple(draw.choices((4, 5, 6, 7, 8), k=draw.randint(2, 4))) for _ in range(40)}
    return {3 * i: [*label, 9] for i, label in enumerate(sorted(made))}


def attentive_llama(seed: int) -> torch.nn.Module:
    """Whose answers depend on all that it attends to, as those of small random weights hardly do."""
    model = tiny_llama(seed=seed).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.mul_(8)
    return model


@pytest.mark.parametrize("prefix", [[], [31, 32, 33, 34]])
@pytest.mark.parametrize(("batch", "expanded"), [(1, 1), (3, 2), (16, 8), (16, 100)])
def test_best_is_the_most_probable_label(
    prefix: list[int], batch: int, expanded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_trie, "EXPANDED", expanded)
    answers = []
    for seed in range(4):
        best = LabelScorer(attentive_llama(seed), batch=batch).best(PROMPTS, tries_of(seed), prefix)
        assert best == most_probable(seed, tuple(prefix))
        answers += best
    assert len(set(answers)) > 5


def tries_of(seed: int) -> list[LabelTrie]:
    return [LabelTrie(many_labels(10 * seed + i)) for i in range(len(PROMPTS) - 1)] + [LabelTrie({5: [4, 9]})]


@cache
def most_probable(seed: int, prefix: tuple[int, ...]) -> list[int]:
    """Every label of every prompt by itself."""
    model, found = attentive_llama(seed), []
    for prompt, trie in zip(PROMPTS, tries_of(seed), strict=True):
        scores = {
            c: brute_force(model, [*prefix, *prompt], path_to(trie, leaf))
            for c, leaf in zip(trie.classes, trie.leaves, strict=True)
        }
        found.append(max(scores, key=lambda c: scores[c]))
    return found


def path_to(trie: LabelTrie, node: int) -> list[int]:
    tokens = []
    while node:
        tokens.append(trie.tokens[node])
        node = trie.parents[node]
    return tokens[::-1]


def test_best_runs_no_node_that_is_less_probable_than_the_best_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_trie, "EXPANDED", 1)
    model, trie, run = tiny_llama().double(), LabelTrie(many_labels(0)), []
    model.register_forward_hook(lambda *call: run.append(call[2]["input_ids"].numel()), with_kwargs=True)
    (best,) = LabelScorer(model).best([PROMPTS[0]], trie)
    ran = list(run)
    highest = brute_force(model, PROMPTS[0], path_to(trie, trie.leaves[trie.classes.index(best)]))
    better = [node for node in trie.inner if brute_force(model, PROMPTS[0], path_to(trie, node)) > highest]
    assert ran == [len(PROMPTS[0])] + [1] * len(better)
    assert len(better) < len(trie.inner)


def descend(model: torch.nn.Module, prompt: list[int]) -> int:
    """Greedy descent, every step a fresh pass."""
    left, said = dict(LABELS), []
    while len(left) > 1:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + said])).logits[0, -1]
        token = max({answer[len(said)] for answer in left.values()}, key=lambda t: float(logits[t]))
        said.append(token)
        left = {c: answer for c, answer in left.items() if answer[: len(said)] == said}
    return next(iter(left))


@pytest.mark.parametrize("prefix", [[], [31, 32]])
def test_greedy_descends_by_the_most_probable_token(prefix: list[int]) -> None:
    answers = []
    for seed in range(4):
        model = tiny_llama(seed=seed)
        found = LabelScorer(model, batch=2).greedy(PROMPTS, LabelTrie(LABELS), prefix)
        assert found == [descend(model, prefix + prompt) for prompt in PROMPTS]
        answers += found
    assert len(set(answers)) > 2


def test_loss_is_the_negative_score() -> None:
    model = tiny_llama()
    answers = [LABELS[c] for c in (3, 0, 7, 2, 5)]
    expected = -sum(brute_force(model, p, a) for p, a in zip(PROMPTS, answers, strict=True)) / len(PROMPTS)
    assert float(answer_loss(model, PROMPTS, answers)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sequences", [{}, {0: [1], 1: [1, 2]}, {0: [1, 2], 1: [1]}, {0: [1], 1: [1]}, {0: []}])
def test_refuses_labels_that_cannot_be_told_apart(sequences: dict[int, list[int]]) -> None:
    with pytest.raises(ValueError, match="label"):
        LabelTrie(sequences)
