"""Memories of classes against their closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nestling.evaluation.class_incremental.class_memory import AssociativeMemory, ClassMeans


def stream(count: int = 40, width: int = 6, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) * classes // count + 3  # classes one after the other, not from 0
    keys = torch.randn(count, width, generator=generator, dtype=torch.float64) + labels[:, None] * 0.5
    return keys, labels


def ridge(keys: torch.Tensor, labels: torch.Tensor, strength: float, projection: torch.Tensor | None) -> torch.Tensor:
    if projection is not None:
        keys = (keys @ projection).relu()
    keys = torch.cat((keys, torch.ones(len(keys), 1, dtype=keys.dtype)), 1)
    values = torch.nn.functional.one_hot(labels - labels.min()).double()
    return torch.linalg.solve(keys.mT @ keys + strength * torch.eye(keys.shape[1]).double(), keys.mT @ values).mT


@pytest.mark.parametrize("expansion", [0, 9])
@pytest.mark.parametrize("sizes", [(40,), (1,) * 40, (7, 1, 20, 12)])
def test_least_squares_is_ridge_regression_on_everything_written(expansion: int, sizes: tuple[int, ...]) -> None:
    keys, labels = stream()
    memory = AssociativeMemory(6, 0.3, expansion=expansion)
    for part, own in zip(keys.split(sizes), labels.split(sizes), strict=True):
        memory.write(part, own)
    assert memory.classes == [3, 4, 5, 6, 7]
    torch.testing.assert_close(memory.weights, ridge(keys, labels, 0.3, memory.projection), rtol=1e-9, atol=1e-10)


def test_the_order_makes_no_difference_to_least_squares() -> None:
    keys, labels = stream()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    first, second = AssociativeMemory(6), AssociativeMemory(6)
    first.write(keys, labels)
    second.write(keys[order], labels[order])
    columns = [second.classes.index(c) for c in first.classes]
    torch.testing.assert_close(first.scores(keys), second.scores(keys)[:, columns], rtol=1e-9, atol=1e-10)


def test_delta_rule_token_by_token() -> None:
    keys, labels = stream(12, 4, 2)
    memory = AssociativeMemory(4, rule="delta", rate=0.7)
    memory.write(keys[:5], labels[:5])
    memory.write(keys[5:], labels[5:])
    weights = torch.zeros(2, 5, dtype=torch.float64)
    for key, label in zip(keys, labels - 3, strict=True):
        k = torch.cat((key, torch.ones(1).double()))
        error = torch.nn.functional.one_hot(label, 2) - weights @ k
        weights += 0.7 * torch.outer(error, k) / k.square().sum()
    torch.testing.assert_close(memory.weights, weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(40,), (3, 30, 7)])
def test_means_and_shared_covariance(sizes: tuple[int, ...]) -> None:
    keys, labels = stream()
    means = ClassMeans(6, shrinkage=0.2)
    for part, own in zip(keys.split(sizes), labels.split(sizes), strict=True):
        means.write(part, own)
    centres = torch.stack([keys[labels == c].mean(0) for c in means.classes])
    spread = keys - centres[labels - 3]
    covariance = spread.mT @ spread / 40
    metric = torch.linalg.inv(0.8 * covariance + 0.2 * covariance.trace() / 6 * torch.eye(6).double())
    apart = keys[:, None] - centres
    torch.testing.assert_close(means.scores(keys), -torch.einsum("ncd,de,nce->nc", apart, metric, apart))
    plain = ClassMeans(6, "euclidean")
    plain.write(keys, labels)
    torch.testing.assert_close(plain.scores(keys), -apart.square().sum(-1))


@pytest.mark.parametrize("arguments", [{"ridge": 0.0}, {"rate": 2.0}, {"rate": 0.0}])
def test_refuses_rates_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ridge"):
        AssociativeMemory(4, **arguments)
    with pytest.raises(ValueError, match="shrinkage"):
        ClassMeans(4, shrinkage=1.1)
