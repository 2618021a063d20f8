"""EWC against its formula by automatic differentiation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from nestling.errors import NonFiniteGradientError
from nestling.evaluation.class_incremental.ewc import ElasticWeightConsolidation, diagonal_fisher


def losses(model: nn.Linear, seed: int, count: int = 5) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(1, 3, generator=generator, dtype=torch.float64)
        label = torch.randint(4, (1,), generator=generator)
        yield nn.functional.cross_entropy(model(x), label)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4, dtype=torch.float64)


def move(model: nn.Linear) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype))


def penalty_gradient(ewc: ElasticWeightConsolidation, model: nn.Linear) -> dict[str, Tensor]:
    model.zero_grad()
    ewc.add_gradient()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_fisher_of_logistic_regression_in_closed_form() -> None:
    model = linear()
    found = diagonal_fisher(dict(model.named_parameters()), losses(model, 1))
    generator, expected = torch.Generator().manual_seed(1), torch.zeros(4, 3, dtype=torch.float64)
    for _ in range(5):
        x = torch.randn(1, 3, generator=generator, dtype=torch.float64)
        label = torch.randint(4, (1,), generator=generator)
        error = model(x).softmax(-1)[0] - nn.functional.one_hot(label, 4)[0]
        expected += torch.outer(error, x[0]).square() / 5
    torch.testing.assert_close(found["weight"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("retention", [None, 1.0, 0.5, 0.0])
def test_gradient_is_that_of_the_formula(retention: float | None) -> None:
    model, strength = linear(), 3.0
    named = dict(model.named_parameters())
    ewc = ElasticWeightConsolidation(named, strength, retention)
    solved: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for task in range(3):
        move(model)
        solved.append((diagonal_fisher(named, losses(model, task)), {n: p.detach().clone() for n, p in named.items()}))
        ewc.consolidate(losses(model, task))
    move(model)
    if retention is None:
        terms = [(f[n], c[n], named[n]) for f, c in solved for n in named]
    else:
        online = {n: sum(retention ** (2 - i) * f[n] for i, (f, _) in enumerate(solved)) for n in named}
        terms = [(online[n], solved[-1][1][n], named[n]) for n in named]
    penalty = sum((strength / 2 * f * (p - c).square()).sum() for f, c, p in terms)
    expected = dict(zip(named, torch.autograd.grad(penalty, list(named.values())), strict=True))
    found = penalty_gradient(ewc, model)
    for name in named:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


def test_adds_to_the_gradient_there_is() -> None:
    model = linear()
    ewc = ElasticWeightConsolidation(dict(model.named_parameters()), 1.0)
    ewc.consolidate(losses(model, 0))
    move(model)
    alone = penalty_gradient(ewc, model)["weight"]
    model.weight.grad = torch.ones_like(model.weight)
    ewc.add_gradient()
    torch.testing.assert_close(model.weight.grad, alone + 1)


def test_nothing_is_held_before_the_first_task() -> None:
    model = linear()
    assert penalty_gradient(ElasticWeightConsolidation(dict(model.named_parameters()), 1.0), model) == {}


def test_refuses_what_makes_no_sense() -> None:
    model = linear()
    with pytest.raises(ValueError, match="empty"):
        ElasticWeightConsolidation({}, 1.0)
    for strength, retention in ((-1.0, None), (1.0, 1.5)):
        with pytest.raises(ValueError, match="strength"):
            ElasticWeightConsolidation(dict(model.named_parameters()), strength, retention)
    ewc = ElasticWeightConsolidation(dict(model.named_parameters()), 1.0)
    with pytest.raises(ValueError, match="empty"):
        ewc.consolidate([])
    with pytest.raises(NonFiniteGradientError):
        ewc.consolidate([model.weight.sum() * torch.nan])
    assert not ewc.fisher
