"""Scores of labels against one plain pass a label."""

from __future__ import annotations

import pytest
import torch

from nestling.evaluation.label_trie import LabelScorer, LabelTrie, answer_loss
from tests.evaluation.class_models import tiny_llama

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


def test_best_is_the_most_probable_label() -> None:
    model = tiny_llama(seed=1)
    best = LabelScorer(model).best(PROMPTS, LabelTrie(LABELS))
    for prompt, label in zip(PROMPTS, best, strict=True):
        assert label == max(LABELS, key=lambda c: brute_force(model, prompt, LABELS[c]))


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
