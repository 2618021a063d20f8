from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from nestling.levels import Component, Frequency, NestedSystem, Problem, Transfer, descent


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_one_objective_is_one_gradient_flow_at_two_frequencies() -> None:
    """Both gradients are taken before either moves; the slow one is summed over its period (Eq. 71)."""
    a, b = parameter(1.0), parameter(2.0)
    calls = []

    def product(batch: float, _: Any) -> Tensor:
        calls.append(batch)
        return (batch * a * b).sum()

    make = partial(SGD, lr=0.1)
    fast = Problem(name="a", parameters=[a], objective=product, optimizer=make)
    slow = Problem(name="b", parameters=[b], objective=product, optimizer=make, period=2)
    system = NestedSystem.define("pair", [fast, slow])
    assert [str(level.frequency) for level in system.levels] == ["1 / step", "1 / 2 steps"]
    losses = system.step(3.0)
    assert losses == {"a": 6.0, "b": 6.0} and calls == [3.0]
    assert (a.item(), b.item()) == pytest.approx((1 - 0.1 * 6, 2.0))
    system.step(1.0)
    assert (a.item(), b.item()) == pytest.approx((0.4 - 0.1 * 2, 2 - 0.1 * (3 * 1 + 1 * 0.4)))
    assert a.grad is None and b.grad is None


def test_objectives_of_their_own_see_what_the_faster_have_become() -> None:
    a, b = parameter(1.0), parameter(2.0)
    make = partial(SGD, lr=1.0)
    first = Problem(name="a", parameters=[a], objective=lambda x, _: (a * x).sum(), optimizer=make)
    second = Problem(name="b", parameters=[b], objective=lambda x, _: (b * a.detach()).sum(), optimizer=make)
    NestedSystem.define("chain", [first, second]).step(3.0)
    assert (a.item(), b.item()) == (-2.0, 4.0)


def in_context(**changes: Any) -> Problem:
    options: dict[str, Any] = {
        "name": "w",
        "start": lambda batch, _: {"w": torch.zeros(1, dtype=torch.float64)},
        "objective": lambda x, solved: 0.5 * (solved["w"]["w"] - x).square().sum(),
        "context": lambda batch: batch,
        "rule": descent(0.5),
        "flow": "tokens",
    }
    return Problem(**options | changes)


def test_learning_in_context_by_the_item_and_by_the_chunk() -> None:
    items = torch.tensor([4.0, 2.0, 8.0, 6.0, 10.0], dtype=torch.float64)
    one = NestedSystem.define("", [in_context(history=True)])
    path = [w["w"].item() for w in one.runner.solve(items)["w"]]  # type: ignore[union-attr]
    assert path == [0.0, 2.0, 2.0, 5.0, 5.5, 7.75]
    two = NestedSystem.define("", [in_context(history=True, period=2)])
    assert str(two.levels[0].frequency) == "1 / 2 tokens"
    path = [w["w"].item() for w in two.runner.solve(items)["w"]]  # type: ignore[union-attr]
    assert path == [0.0, 0.0, 3.0, 3.0, 7.0, 7.0]  # the last item waits for its chunk
    assert one.step(items) == {"w": 0.5 * 4.5**2}


@pytest.mark.parametrize("differentiable", [True, False])
def test_the_slow_level_differentiates_through_the_fast_or_not(differentiable: bool) -> None:
    """f(p) = w1 with w1 = p - (p^3)' / 2 = p - 1.5 p^2: slope 1 - 3 p, or 1 to first order."""
    p = parameter(0.5)
    fast = in_context(
        start=lambda batch, _: {"w": p},
        objective=lambda x, solved: solved["w"]["w"].pow(3).sum(),
        context=lambda batch: [0],
        differentiable=differentiable,
    )
    make = partial(SGD, lr=1.0)
    slow = Problem(name="p", parameters=[p], objective=lambda _, solved: solved["w"]["w"].sum(), optimizer=make)
    NestedSystem.define("", [fast, slow]).step(None)
    assert p.item() == pytest.approx(0.5 - (1 - 3 * 0.5 if differentiable else 1.0))


def test_a_rule_may_remember() -> None:
    def heavy(weights: Any, gradients: Any, memory: Any) -> Any:
        m = gradients["w"] + (0 if memory is None else 0.5 * memory)
        return {"w": weights["w"] - m}, m

    problem = in_context(rule=heavy, objective=lambda x, solved: (solved["w"]["w"] * x).sum())
    solved = NestedSystem.define("", [problem]).runner.solve(torch.tensor([1.0, 2.0, 4.0]))  # type: ignore[union-attr]
    assert float(solved["w"]["w"]) == -(1 + 2.5 + 5.25)


def test_definition_2_orders_components() -> None:
    def make(name: str, frequency: Frequency, *feeds: str) -> Component:
        return Component(
            name=name, kind="parameters", frequency=frequency, context="samples", objective="", rule="", feeds=feeds
        )

    step, slow = Frequency("step"), Frequency("step", 8)
    parts = [
        make("never", Frequency("never")),
        make("weights", step),
        make("slow", slow),
        make("momentum", step, "weights", "slow"),
        make("filter", step, "momentum"),
        make("alone", step),
        make("attention", Frequency("query")),
        make("chunk", Frequency("token", 64)),
        make("token", Frequency("token")),
    ]
    system = NestedSystem.of("", parts)
    assert [{c.name for c in level.components} for level in system.levels] == [
        {"attention"},
        {"token"},
        {"chunk"},
        {"filter"},
        {"momentum"},
        {"weights", "alone"},
        {"slow"},
        {"never"},
    ]
    assert system.level_of("slow") == 7
    circle = [make("a", step, "b"), make("b", step, "a")]
    assert len(NestedSystem.of("", circle).components) == 2
    with pytest.raises(KeyError):
        system.level_of("nobody")
    with pytest.raises(ValueError, match="a is given twice"):
        NestedSystem.of("", [circle[0], circle[0]])
    with pytest.raises(ValueError, match="do not exist: c"):
        NestedSystem.of("", circle, [Transfer("a", "c", "parametric", "")])


def test_problems_that_are_not_well_defined() -> None:
    def nothing(batch: Any, solved: Any) -> Tensor:
        return torch.zeros(())

    with pytest.raises(ValueError, match="'x' needs either parameters"):
        Problem(name="x", objective=nothing)
    with pytest.raises(ValueError, match="'x' needs an optimizer"):
        Problem(name="x", objective=nothing, parameters=[parameter(1.0)])
    with pytest.raises(ValueError, match="period of problem 'x' must be at least 1, not 0"):
        in_context(name="x", period=0)
    with pytest.raises(ValueError, match="at least one problem"):
        NestedSystem.define("", [])
