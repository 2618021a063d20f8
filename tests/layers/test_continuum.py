"""The continuum memory equals its equations token by token, keeps the state contract, and learns what it says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from nestling.layers import continuum
from nestling.layers.continuum import ContinuumConfig, ContinuumMemory, LevelState
from tests.layers.battery import CHECKS, gradients, noise, weigh
from tests.layers.reference_continuum import apply, reference

HIDDEN = 8
FIRST: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 12, "target": "next"}
VARIANTS: dict[str, tuple[int | None, ...]] = {
    "sequential": (2, 3, 8, None),
    "nested": (2, 4, 8, None),
    "headwise": (2, 5, 8, None),
}


def make_layer(**settings: Any) -> ContinuumMemory:
    """A float64 layer whose parameters all differ from their first values."""
    layer = ContinuumMemory(ContinuumConfig(**FIRST | settings)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def fast_levels(layer: ContinuumMemory, x: Tensor, **kwargs: Tensor) -> tuple[Tensor, list[LevelState]]:
    """Output, and the states of the levels that have one."""
    y, state = layer(x, **kwargs)
    return y, [level for level in state.levels if level is not None]


def assert_equals_reference(layer: ContinuumMemory, time: int) -> None:
    """Outputs, final states and every gradient through both."""
    x = noise(2, time, HIDDEN).requires_grad_()
    y, levels = fast_levels(layer, x)
    wanted_y, wanted_levels = reference(layer, x)
    found, wanted = [y], [wanted_y]
    fast = [part for part in layer.levels if part.period is not None]
    for part, level, expected in zip(fast, levels, wanted_levels, strict=False):
        if part.gain is not None:  # differences to the parameter
            running, initial = (None if w is None else w + part.down for w in (level.running, level.initial))
            level = replace(level, start=level.start + part.down, running=running, initial=initial)
        found.append(level.start)
        wanted.append(expected.start)
        if level.running is not None:
            found.append(level.running)
            wanted.append(expected.running)
        if level.surprise is not None:
            found.append(level.surprise)
            wanted.append(expected.surprise)
        if level.initial is not None:
            found.append(level.initial)
            wanted.append(expected.initial)
        if level.tail is not None:
            found.append(level.tail[:, 0])
            wanted.append(expected.last)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    total, wanted_total = (sum(map(weigh, group), torch.zeros(())) for group in (found, wanted))
    torch.testing.assert_close(gradients(total, [x], layer), gradients(wanted_total, [x], layer), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("erase", [False, True], ids=["plain", "erase"])
@pytest.mark.parametrize("target", ["next", "value", "reconstruction"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_equations(variant: str, target: str, erase: bool) -> None:
    layer = make_layer(variant=variant, periods=VARIANTS[variant], target=target, erase=erase)
    assert_equals_reference(layer, 19)


@pytest.mark.parametrize("time", [1, 2, 7, 8, 16])
def test_equals_the_equations_at_and_between_the_ends_of_periods(time: int) -> None:
    for variant, periods in VARIANTS.items():
        assert_equals_reference(make_layer(variant=variant, periods=periods, erase=True), time)


def test_equals_the_equations_where_every_level_is_fast_and_periods_are_equal() -> None:
    assert_equals_reference(make_layer(variant="nested", periods=(1, 3, 3)), 11)
    assert_equals_reference(make_layer(periods=(5, 1), target="value"), 11)


def test_a_period_longer_than_one_solve_is_the_same_erase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuum, "MAX_SOLVE", 3)
    assert_equals_reference(make_layer(periods=(11, 2), erase=True), 25)


CONTRACT: dict[str, dict[str, Any]] = {
    "plain": {"periods": (None,)},
    "one token": {"periods": (1,), "target": "value"},
    "longer than the text": {"periods": (100, 5), "erase": True},
    "nested erase value": {"periods": (2, 4, 12), "variant": "nested", "erase": True, "target": "value"},
    "nested equal": {"periods": (3, 3, None), "variant": "nested", "target": "reconstruction"},
    "headwise erase next": {"periods": (3, 7), "variant": "headwise", "erase": True},
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("settings", CONTRACT)
def test_contract(settings: str, check: str) -> None:
    CHECKS[check](make_layer(**CONTRACT[settings]), HIDDEN)


@pytest.mark.parametrize(
    "settings",
    [
        {"periods": (2, None), "erase": True},
        {"periods": (2, 4), "variant": "nested", "target": "value"},
        {"periods": (2, 3), "variant": "headwise", "erase": True, "target": "reconstruction"},
    ],
    ids=str,
)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_gradcheck(settings: dict[str, Any], ragged: bool) -> None:
    layer = make_layer(hidden_size=3, intermediate_size=4, **settings)
    names = [name for name, _ in layer.named_parameters()]
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 0]]) if ragged else None

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        y, state = functional_call(layer, dict(zip(names, parameters, strict=True)), (x,), {"mask": mask})
        return y, *(t for _, t in state.tensors() if t.is_floating_point())

    x = noise(2, 6, 3).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


def test_all_parameters_learn() -> None:
    """A loss on the output alone reaches every parameter: the writes are differentiated, not cut."""
    for (variant, periods), target in itertools.product(VARIANTS.items(), ("next", "value", "reconstruction")):
        layer = make_layer(variant=variant, periods=periods, target=target)
        layer(noise(2, 33, HIDDEN))[0].square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.any()), f"{variant}, {target}: {name}"


def stream_layer(**settings: Any) -> ContinuumMemory:
    """One level whose key and target stay in place on a constant stream."""
    return make_layer(periods=(4,), target="value", **settings)


@pytest.mark.parametrize("erase", [False, True], ids=["plain", "erase"])
def test_a_constant_stream_is_learned(erase: bool) -> None:
    """Period by period the output at the key moves to the target, with the erase to half of it."""
    layer = stream_layer(erase=erase)
    x = noise(1, 1, HIDDEN).expand(1, 400, -1)
    part = layer.levels[0]
    with torch.no_grad():
        y = (layer(x)[0] - x)[0, ::4]
        target = part.value(part.norm(x[0, 0]))
    error = (y - (target / 2 if erase else target)).norm(dim=-1)
    key = part.gate(part.norm(x[0, 0])), part.up(part.norm(x[0, 0]))
    assert bool((torch.nn.functional.silu(key[0]) * key[1]).norm() > 0.5), "the key is too short for this test"
    assert bool((error[1:] <= error[:-1] + 1e-12).all())
    assert error[-1] < 1e-3 * error[0]


def test_next_predicts_the_next_token() -> None:
    """On the stream a b c a b c the level comes to answer every token with the projection of the one after it."""
    layer = make_layer(periods=(3,), intermediate_size=64)
    text = noise(1, 3, HIDDEN).repeat(1, 3000, 1)
    with torch.no_grad():
        y = (layer(text)[0] - text)[0]
        part = layer.levels[0]
        wanted = part.value(part.norm(text))[0, 1:]
    error = (y[:-1] - wanted).norm(dim=-1)
    assert error[-3:].max() < 0.05 * error[:3].min()


def test_levels_stay_a_value_of_their_own_past() -> None:
    """The weights a level answers from change at the ends of its periods and nowhere else."""
    layer = make_layer(periods=(3, 5), variant="headwise")
    state = None
    starts: list[list[Tensor]] = []
    with torch.no_grad():
        for token in noise(1, 16, HIDDEN).split(1, 1):
            _, state = layer(token, state)
            starts.append([level.start for level in state.levels if level is not None])
    for i, period in enumerate((3, 5)):
        moved = [n + 2 for n, (a, b) in enumerate(itertools.pairwise(starts)) if not torch.equal(a[i], b[i])]
        assert moved == [n for n in range(2, 17) if n % period == 0]


def test_output_is_read_before_the_token_is_written() -> None:
    """`apply` of the period's first weight, for all tokens of the period."""
    layer = make_layer(periods=(4,), target="reconstruction")
    x = noise(2, 11, HIDDEN)
    _, levels = fast_levels(layer, x[:, :8])
    part = layer.levels[0]
    u = part.norm(x[:, 8:])
    h = torch.nn.functional.silu(part.gate(u)) * part.up(u)
    wanted = torch.stack([apply(levels[0].start, h[:, t]) for t in range(3)], 1)
    torch.testing.assert_close(layer(x)[0][:, 8:] - x[:, 8:], wanted)
