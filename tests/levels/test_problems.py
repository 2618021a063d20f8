from __future__ import annotations

import dataclasses
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


@pytest.mark.parametrize("feeds", [(), ("b",)])
def test_problems_that_read_one_context_together(feeds: tuple[str, ...]) -> None:
    """Each sees the other as it was before the item, or where that feeds it as it is after it (Definition 2)."""

    def start(value: float) -> Any:
        return lambda *_: {"w": torch.tensor([value], dtype=torch.float64)}

    def towards(name: str, other: str) -> Any:
        return lambda x, solved: (solved[name]["w"] - solved[other]["w"] - x).square().sum() / 2

    a = in_context(
        name="a", start=start(1.0), objective=towards("a", "b"), rule=descent(1.0), feeds=feeds, history=True
    )
    b = Problem(
        name="b",
        start=start(2.0),
        objective=towards("b", "a"),
        rule=descent(1.0),
        beside="a",
        flow="tokens",
        history=True,
    )
    system = NestedSystem.define("", [a, b])
    solved = system.runner.solve(torch.tensor([10.0, 20.0], dtype=torch.float64))  # type: ignore[union-attr]
    found = [[float(w["w"].detach()) for w in solved[name]] for name in "ab"]
    # a becomes b + x and b becomes a + x, of the old a or of the new one.
    assert found == ([[1, 12, 31], [2, 11, 32]] if not feeds else [[1, 12, 42], [2, 22, 62]])
    assert [{c.name for c in level.components} for level in system.levels] == (
        [{"a"}, {"b"}] if feeds else [{"a", "b"}]
    )


def test_what_a_memory_makes_itself_is_given_to_it() -> None:
    """d/dw (w k - 1)^2 / 2 with k = w from itself: (w k - 1) k for the inner gradient, all of it for the outer one."""
    p = parameter(3.0)
    problem = in_context(
        start=lambda *_: {"w": p},
        context=lambda batch: [0],
        given=lambda item, solved: solved["w"]["w"],
        objective=lambda k, solved: (solved["w"]["w"] * k - 1).square().sum() / 2,
        rule=descent(0.1),
    )
    w = NestedSystem.define("", [problem]).runner.solve(None)["w"]["w"]  # type: ignore[union-attr]
    assert float(w.detach()) == pytest.approx(3 - 0.1 * (9 - 1) * 3)
    (slope,) = torch.autograd.grad(w.sum(), p)
    assert float(slope) == pytest.approx(1 - 0.1 * (3 * 9 - 1))  # of p - 0.1 (p^3 - p)


@pytest.mark.parametrize("through", [True, False])
def test_three_levels_that_restart_from_the_level_above(through: bool) -> None:
    """NL Eq. 72: every level's first weights are learned by the level around it, through its learning or beside it."""
    rate = {"low": 0.5, "middle": 0.25, "high": 0.125}

    def start(above: str) -> Any:
        return lambda batch, solved: solved[above]

    def after(name: str) -> Any:
        return lambda _, solved: solved[name]["w"].square().sum() / 2

    low = in_context(
        name="low",
        start=start("middle"),
        rule=descent(rate["low"]),
        objective=lambda x, s: (s["low"]["w"] - x).square().sum() / 2,
    )
    middle = in_context(
        name="middle",
        start=start("high"),
        rule=descent(rate["middle"]),
        objective=after("low"),
        inside=[low],
        through=through,
        span=2,
    )
    high = in_context(
        name="high", rule=descent(rate["high"]), objective=after("middle"), inside=[middle], through=through, span=4
    )
    high = dataclasses.replace(high, start=lambda *_: {"w": torch.ones(1, dtype=torch.float64)})
    system = NestedSystem.define("", [high])
    assert [str(level.frequency) for level in system.levels] == ["1 / token", "1 / 2 tokens", "1 / 4 tokens"]
    stream = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(2, 2, 2)
    found = system.runner.solve(stream)["high"]["w"]  # type: ignore[union-attr]

    # The same with numbers and their slopes: of what is learned inside by the weights it starts from.
    top = 1.0
    for chapter in stream:
        weight, slope = top, 1.0
        for section in chapter:
            inner, inner_slope = weight, 1.0
            for x in section.tolist():
                inner, inner_slope = inner - rate["low"] * (inner - x), (1 - rate["low"]) * inner_slope
            # Gradient of inner^2 / 2 by the weight: inner times its slope; without `through` inner is a constant.
            step = inner * inner_slope if through else 0.0
            weight, slope = weight - rate["middle"] * step, slope * (1 - rate["middle"] * inner_slope**2 * through)
        top = top - rate["high"] * (weight * slope if through else 0.0)
    assert float(found.detach()) == pytest.approx(top)
    assert through == (top != 1.0)


def test_inner_problems_hand_on_a_list() -> None:
    low = in_context(name="low", objective=lambda x, s: s["low"]["w"].sum(), history=True)
    high = in_context(name="high", inside=[low], objective=lambda x, s: s["high"]["w"].square().sum())
    solved = NestedSystem.define("", [high]).runner.solve(torch.ones(3, 2).double())  # type: ignore[union-attr]
    assert [len(path) for path in solved["low"]] == [3, 3, 3]


def test_a_non_parametric_problem_holds_nothing() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    mean = Problem(
        name="mean",
        solution=lambda item, _: item.mean(),
        objective=lambda item, solved: (item - solved["mean"]).square().sum(),
        context=lambda batch: [batch[: t + 1] for t in range(len(batch))],
        history=True,
    )
    system = NestedSystem.define("", [mean])
    assert system.step(values) == {"mean": 14.0}
    assert [float(m) for m in system.runner.solve(values)["mean"]] == [1.0, 1.5, 3.0]  # type: ignore[union-attr]
    (found,) = system.components
    assert (found.kind, str(found.frequency), found.rule) == ("attention", "∞", "solved for every item")


def part(name: str, frequency: Frequency, *feeds: str) -> Component:
    return Component(
        name=name, kind="parameters", frequency=frequency, context="samples", objective="", rule="", feeds=feeds
    )


@pytest.mark.parametrize(
    ("tokens", "order"),
    [
        (512, [{"chunk 64"}, {"chunk 256"}, {"weights"}, {"chunk 1024"}, {"slow"}]),
        (256, [{"chunk 64"}, {"chunk 256", "weights"}, {"chunk 1024"}, {"slow"}]),
        (100, [{"chunk 64"}, {"weights"}, {"chunk 256"}, {"slow"}, {"chunk 1024"}]),
        (128, [{"chunk 64"}, {"weights"}, {"chunk 256"}, {"chunk 1024", "slow"}]),
        (None, [{"chunk 64"}, {"chunk 256"}, {"chunk 1024"}, {"weights"}, {"slow"}]),
    ],
)
def test_tokens_and_steps_are_compared_on_one_clock(tokens: int | None, order: list[set[str]]) -> None:
    parts = [part(f"chunk {n}", Frequency("token", n, tokens)) for n in (64, 256, 1024)]
    parts += [part("weights", Frequency("step")), part("slow", Frequency("step", 8))]
    system = NestedSystem.of("", parts)
    assert [{c.name for c in level.components} for level in system.levels] == order
    assert len(system.notes) == (tokens is None)
    if tokens is None:
        assert "which is so from 1,025 tokens a step" in system.notes[0]
        # The note's number is the first for which the order is right.
        for known, right in ((1025, True), (1024, False)):
            told = [dataclasses.replace(c, frequency=dataclasses.replace(c.frequency, per_step=known)) for c in parts]
            again = NestedSystem.of("", told)
            assert ([{c.name for c in level.components} for level in again.levels] == order) == right


def test_at_equal_rates_what_others_wait_for_comes_first() -> None:
    parts = [part("weights", Frequency("step", 2)), part("memory", Frequency("token", 64, 32), "weights")]
    system = NestedSystem.of("", parts)
    assert [{c.name for c in level.components} for level in system.levels] == [{"memory"}, {"weights"}]
    both = NestedSystem.of("", [parts[0], part("alone", Frequency("token", 64, 32))])
    assert both.levels[0].updates == "1 / 2 steps = 1 / 64 tokens"
    assert both.to_dict()["levels"][0]["updates_per_step"] == 0.5
    assert "1 / 2 steps = 1 / 64 tokens" in str(both)


def test_a_rate_in_words() -> None:
    words = [Frequency("token", period, 512).rate_text() for period in (1, 64, 300, 512, 2048)]
    assert words == ["512 / step", "8 / step", "1.707 / step", "1 / step", "1 / 4 steps"]
    assert not any(f.rate_text() for f in (Frequency("token"), Frequency("step", 8), Frequency("never")))


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

    def own(*_: Any) -> Any:
        return {}

    for ways in ({}, {"start": own, "solution": nothing}, {"parameters": [parameter(1.0)], "start": own}):
        with pytest.raises(ValueError, match=r"'x' needs either parameters.* and only one of them"):
            Problem(name="x", objective=nothing, **ways)
    with pytest.raises(ValueError, match="'x' does not learn in context, so inside and given have no meaning"):
        Problem(name="x", objective=nothing, solution=nothing, given=own)
    with pytest.raises(ValueError, match="'x' reads the context of 'y': it learns in context and has none itself"):
        in_context(name="x", beside="y")
    make = partial(SGD, lr=1.0)
    with pytest.raises(ValueError, match="problems inside 'x' live for one of its items"):
        in_context(name="x", inside=[Problem(name="y", objective=nothing, parameters=[parameter(1.0)], optimizer=make)])
    follows = Problem(name="y", objective=nothing, start=own, beside="x")
    with pytest.raises(ValueError, match="'y' is beside 'x', which is no earlier problem with a context"):
        NestedSystem.define("", [follows])
    with pytest.raises(ValueError, match="'z' feeds 'x' at the same item, so list it first"):
        NestedSystem.define(
            "", [in_context(name="x"), Problem(name="z", objective=nothing, start=own, beside="x", feeds=("x",))]
        )
    with pytest.raises(ValueError, match="is beside 'x'"):
        NestedSystem.define("", [in_context(name="w", inside=[follows])])
    with pytest.raises(ValueError, match="the span of problem 'x' must be at least 1, not 0"):
        in_context(name="x", span=0)
    with pytest.raises(ValueError, match="'x' needs an optimizer"):
        Problem(name="x", objective=nothing, parameters=[parameter(1.0)])
    with pytest.raises(ValueError, match="period of problem 'x' must be at least 1, not 0"):
        in_context(name="x", period=0)
    with pytest.raises(ValueError, match="at least one problem"):
        NestedSystem.define("", [])
