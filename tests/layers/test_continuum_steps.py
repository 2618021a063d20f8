"""Steps over a whole period, momentum, retention and the gain of a continuum level: equations, contract, bounds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from nestling.layers.continuum import ContinuumMemory
from nestling.layers.continuum_config import ContinuumConfig
from nestling.layers.continuum_update import PeriodState, proximal_step, spectral_step, with_momentum
from tests.layers.battery import CHECKS, noise
from tests.layers.test_continuum import HIDDEN, VARIANTS, assert_equals_reference, fast_levels, make_layer
from tests.layers.test_continuum_limits import (
    first_level,
    hostile,
    hostile_layer,
    plain_chain,
    read_hostile,
    set_scalar,
    twin,
)

ALL: dict[str, Any] = {"momentum": True, "retention": True, "gain": True}
STEPS = ("token", "spectral", "proximal")
# Keys have 12 entries by default: with 2 a period of 3 has more tokens than a key has entries.
WIDTHS = {"longer keys": 12, "shorter keys": 2}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_equations(variant: str, step: str, width: str) -> None:
    layer = make_layer(
        variant=variant, periods=VARIANTS[variant], target="value", step=step, intermediate_size=WIDTHS[width], **ALL
    )
    assert_equals_reference(layer, 19)


@pytest.mark.parametrize("one", [*ALL, "none"])
@pytest.mark.parametrize("target", ["next", "value", "reconstruction"])
def test_equals_the_equations_one_by_one(target: str, one: str) -> None:
    settings = {} if one == "none" else {one: True}
    for step in STEPS[1:]:
        assert_equals_reference(make_layer(periods=(3, 5), target=target, step=step, **settings), 16)


def test_what_a_level_with_a_gain_erases_is_what_it_has_learned() -> None:
    assert_equals_reference(make_layer(periods=(3, 5), target="value", erase=True, **ALL), 16)


def test_every_level_has_settings_of_its_own() -> None:
    own = {"step": STEPS, "momentum": (True, False, True), "retention": (False, True, False)}
    layer = make_layer(periods=(2, 3, 4), target="value", **own)
    assert_equals_reference(layer, 13)
    found = [(p.rule.step, p.momentum is not None, p.retention is not None) for p in layer.levels]  # type: ignore[union-attr]
    assert found == [("token", True, False), ("spectral", False, True), ("proximal", True, False)]


CONTRACT: dict[str, dict[str, Any]] = {
    "spectral": {"periods": (3, 8), "step": "spectral", "target": "value", **ALL},
    "proximal short keys": {"periods": (3, 8, None), "step": "proximal", "intermediate_size": 5},
    "proximal nested": {"periods": (2, 4, 12), "variant": "nested", "step": "proximal", "target": "value", **ALL},
    "spectral headwise": {"periods": (3, 7), "variant": "headwise", "step": "spectral", "momentum": True},
    "token with all": {"periods": (3, 6), "variant": "nested", "erase": True, **ALL},
    "one a level": {"periods": (4, 1, 100), "step": STEPS, "retention": (True, False, True)},
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("settings", CONTRACT)
def test_contract(settings: str, check: str) -> None:
    CHECKS[check](make_layer(**CONTRACT[settings]), HIDDEN)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("width", [2, 5])
def test_gradcheck(step: str, width: int) -> None:
    layer = make_layer(hidden_size=3, intermediate_size=width, periods=(3,), step=step, target="value", **ALL)
    names = [name for name, _ in layer.named_parameters()]
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 1]])

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        y, state = functional_call(layer, dict(zip(names, parameters, strict=True)), (x,), {"mask": mask})
        return y, *(t for _, t in state.tensors() if t.is_floating_point())

    x = noise(2, 7, 3).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("step", STEPS)
def test_all_parameters_learn(step: str) -> None:
    for variant, periods in VARIANTS.items():
        layer = make_layer(variant=variant, periods=periods, target="value", step=step, **ALL)
        layer(noise(2, 33, HIDDEN))[0].square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.any()), f"{variant}: {name}"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_gain_says_what_the_first_weights_say(variant: str, step: str) -> None:
    """Exactly, whatever the level has learned; and it learns to say more."""
    layer = make_layer(variant=variant, periods=VARIANTS[variant], target="value", step=step, gain=True)
    with torch.no_grad():
        for part in layer.levels:
            if part.gain is not None:
                part.gain.zero_()
    x = noise(2, 33, HIDDEN)
    y, levels = fast_levels(layer, x)
    torch.testing.assert_close(y, plain_chain(layer, x), rtol=1e-12, atol=1e-12)
    assert bool(levels[0].start.any())
    y.square().sum().backward()
    gain = first_level(layer).gain
    assert gain is not None and gain.grad is not None and bool(gain.grad.all())


def test_a_gain_of_one_is_no_gain() -> None:
    layer = make_layer(periods=(2, 5), gain=True, step="proximal")
    with torch.no_grad():
        for part in layer.levels:
            part.gain.fill_(1.0)  # type: ignore[union-attr,operator]
    x = noise(2, 21, HIDDEN)
    torch.testing.assert_close(layer(x)[0], twin(layer, gain=False)(x)[0])


def test_full_retention_and_no_momentum_are_neither() -> None:
    layer = make_layer(periods=(2, 6), variant="nested", momentum=True, retention=True, step="spectral", target="value")
    x = noise(2, 21, HIDDEN)
    set_scalar(layer, "momentum", -math.inf)
    set_scalar(layer, "retention", math.inf)
    torch.testing.assert_close(layer(x)[0], twin(layer, momentum=False, retention=False)(x)[0])


def test_no_retention_keeps_the_first_weights() -> None:
    layer = make_layer(periods=(2, 3), retention=True, momentum=True)
    set_scalar(layer, "retention", -math.inf)
    x = noise(2, 21, HIDDEN)
    torch.testing.assert_close(layer(x)[0], plain_chain(layer, x))


@pytest.mark.parametrize(("step", "moved"), [("token", 0.02), ("spectral", 0.2), ("proximal", 0.2)])
def test_one_update_moves_the_error_by_the_rate(step: str, moved: float) -> None:
    """A step over the whole period moves the error of a lone token by r, and one a token by r / C."""
    layer = make_layer(periods=(10,), step=step, target="value", hidden_size=4, intermediate_size=16)
    set_scalar(layer, "rate", math.log(0.2 / 0.8))
    part = first_level(layer)
    x = torch.zeros(1, 20, 4).double()
    x[:, ::10] = 4 * noise(1, 1, 4)  # elsewhere keys are zeros
    y = layer(x)[0] - x
    u = part.norm(x[0, 0])
    assert part.value is not None and (torch.nn.functional.silu(part.gate(u)) * part.up(u)).norm() > 1
    errors = (y[0, ::10] - part.value(u)).norm(dim=-1)
    torch.testing.assert_close(errors[1] / errors[0], torch.tensor(1 - moved).double())


def test_the_proximal_step_is_the_minimum() -> None:
    keys, errors = noise(2, 7, 5), noise(2, 7, 3, seed=1)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    rate = torch.tensor(0.7).double()
    for period in (3, 7):  # moments, then tokens
        held = PeriodState.of(keys, errors, 0, period) if period == 7 else PeriodState(keys.mT @ keys, keys.mT @ errors)
        moved = proximal_step(held, rate, 7 if period == 7 else 100).requires_grad_()
        after = errors + keys @ moved.mT
        near = moved.square().sum() * (1 - rate) / (2 * rate)
        (slope,) = torch.autograd.grad(after.square().sum() / 2 + near, moved)
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [spectral_step, proximal_step])
def test_a_period_is_the_same_from_tokens_and_from_moments(step: Any) -> None:
    keys, errors = noise(2, 7, 7), noise(2, 7, 3, seed=1)
    rate = torch.tensor(0.7).double()
    tokens = step(PeriodState(keys, errors), rate, 7)
    torch.testing.assert_close(tokens, step(PeriodState(keys.mT @ keys, keys.mT @ errors), rate, 8))


@pytest.mark.parametrize("settings", [{"periods": (8,)}, {"periods": (100,)}], ids=str)
def test_the_carried_period_is_as_small_as_it_can_be(settings: dict[str, Any]) -> None:
    """min(C, K) (K + hidden) numbers, and no running weight."""
    layer = make_layer(step="spectral", target="value", **settings)
    level = layer.init_state(3).levels[0]  # type: ignore[attr-defined]
    rows = min(settings["periods"][0], 12)
    assert level.running is None and level.period is not None
    assert level.period.nbytes == 3 * rows * (12 + HIDDEN) * 8


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_momentum_cannot_be_driven_to_resonance(kept: float) -> None:
    """No update makes the quadratic form of `continuum_update` grow, so no order of updates does; 5% more might."""
    b = torch.tensor(kept).double()
    far = b / (1 - b)
    form = torch.tensor([[1, far], [far, far**2 + b / (1 - b) ** 2]]).double()  # |w + far s|^2 + b / (1 - b)^2 |s|^2

    def growth(p: float) -> float:
        weight, surprise = torch.eye(2).double()[..., None, None]  # what a unit of w, and of s, becomes
        surprise = with_momentum(-p * weight, surprise, b)
        after = torch.cat([weight + surprise, surprise], 1)[..., 0].mT
        return float(torch.linalg.eigvalsh(after.mT @ form @ after - form).max() / form.max())

    assert max(growth(p) for p in torch.linspace(0, 1, 41).tolist()) < 1e-12
    if kept > 0.34:  # below, the bound on P is above 1
        assert growth(1.05) > 1e-9


HOSTILE: dict[str, dict[str, Any]] = {
    "spectral": {"periods": (64, 256), "step": "spectral", "target": "value"},
    "proximal": {"periods": (8, 64), "step": "proximal", "target": "next"},
    "all": {"periods": (64, 128), "step": ("spectral", "proximal"), "target": "value", **ALL},
    "momentum": {"periods": (16, 64), "step": "spectral", "momentum": True, "variant": "headwise"},
    "nested": {"periods": (32, 64, 256), "variant": "nested", "step": "proximal", "momentum": True},
}


@pytest.mark.parametrize("settings", HOSTILE)
def test_stays_bounded_on_hostile_input(settings: str) -> None:
    read_hostile(hostile_layer(**HOSTILE[settings]), hostile(5_000), 4)


@pytest.mark.slow
@pytest.mark.parametrize("settings", HOSTILE)
def test_stays_bounded_for_a_million_tokens(settings: str) -> None:
    read_hostile(hostile_layer(**HOSTILE[settings]), hostile(10_000), 100)


@pytest.mark.parametrize("step", STEPS)
def test_half_precision_keeps_a_float32_state(step: str) -> None:
    exact = ContinuumMemory(
        ContinuumConfig(hidden_size=32, intermediate_size=24, periods=(8, 32), step=step, **ALL)  # type: ignore[arg-type]
    )
    half = ContinuumMemory(exact.config)
    half.load_state_dict(exact.state_dict())
    half = half.to(torch.bfloat16)
    x = torch.randn(2, 50, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = [exact(x), exact(x, exact(x)[1], mask=torch.ones(2, 50))]
    found.append(half(x.bfloat16()))
    for y, state in found:
        for name, tensor in state.tensors():
            assert tensor.dtype == (torch.int64 if name == "position" else torch.float32), name
        y.float().square().sum().backward()
    for name, parameter in itertools.chain(exact.named_parameters(), half.named_parameters()):
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"step": "adam"}, "step is 'token', 'spectral' or 'proximal', not 'adam'"),
    ({"step": ("token", "spectral")}, "step has 2 values for 3 levels; give one value for all, or one a level"),
    ({"step": ("token", "spectral", 1)}, "step is .* not 1"),
    ({"momentum": (True,)}, "momentum has 1 values for 3 levels"),
    ({"momentum": 0.9}, "momentum is False or True, not 0.9"),
    ({"retention": 1}, "retention is False or True, not 1"),
    ({"erase": True, "step": "proximal"}, "erase=True goes with step='token' alone, not with 'proximal'"),
    ({"erase": True, "step": ("token", "token", "spectral")}, "has no order of tokens to erase in"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(s) for s, _ in REFUSED])
def test_refuses_in_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuumConfig(**{"hidden_size": 8, "intermediate_size": 12, "periods": (2, 4, None)} | settings)


def test_a_gain_is_not_moved_by_levels_that_did_not_update() -> None:
    """Its gradient is zero to the bit, in float32 too, until a period is over; also when an optimizer has changed the
    first weights since the text began.
    """
    torch.manual_seed(0)
    layer = ContinuumMemory(ContinuumConfig(hidden_size=32, intermediate_size=48, periods=(4, 64), gain=True))
    with torch.no_grad():
        carried = layer(torch.randn(3, 7, 32))[1]
        for level in layer.levels:
            level.down.add_(0.1 * torch.randn_like(level.down))
    for state in (None, carried):
        layer.zero_grad()
        layer(torch.randn(3, 20, 32), state)[0].square().sum().backward()
        fast, slow = (level.gain.grad for level in layer.levels)
        assert bool(fast.any()) and not bool(slow.any())
