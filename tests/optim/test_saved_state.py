"""A state that an optimizer could not have saved is refused when it is loaded, in words, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Optimizer, RMSprop

from nestling.optim import M3, NAMES, DeltaMomentum, MultiFrequency, OptimizerLevel, PreconditionedMomentum, build
from nestling.optim.multi_frequency import ACCUMULATED
from nestling.optim.saved_state import layouts
from tests.optim.models import Network, batch, loss_of
from tests.optim.subjects import SUBJECTS

Make = Callable[[nn.Module], Optimizer]


def at_levels(name: str, model: nn.Module) -> MultiFrequency:
    """Two levels over all parameters, the second inside its period."""
    everything = list(model.parameters())
    parts = {"fast": OptimizerLevel(everything[:4]), "slow": OptimizerLevel(everything[4:], 3)}
    return MultiFrequency(parts, optimizer=lambda p: build(name, model, lr=0.01, only=p))


NAMED: dict[str, Make] = {name: lambda model, name=name: build(name, model, lr=0.01) for name in NAMES}
LEVELS: dict[str, Make] = {f"levels of {name}": partial(at_levels, name) for name in NAMES}
OURS: dict[str, Make] = {s.name: lambda model, make=s.make: make(model, 0.01) for s in SUBJECTS}
TORCHS: dict[str, Make] = {
    kind.__name__: lambda model, kind=kind: kind(model.parameters(), lr=0.01)
    for kind in (SGD, AdamW, Adagrad, RMSprop, Adafactor)
}
TORCHS["fused"] = lambda model: AdamW(model.parameters(), lr=0.01, fused=True)


def trained(make: Make, steps: int = 2) -> tuple[Network, Optimizer]:
    model = Network()
    model.empty = nn.Parameter(torch.ones(1, 3, dtype=torch.float64))  # Adafactor takes no empty ones
    optimizer = make(model)
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(seed)).backward()
        optimizer.step()
    return model, optimizer


def saved_by(make: Make, steps: int = 2) -> dict[str, Any]:
    return copy.deepcopy(trained(make, steps)[1].state_dict())


def same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            same(found[key], wanted[key])
    else:
        assert torch.equal(found, wanted) if isinstance(wanted, Tensor) else found == wanted


@pytest.mark.parametrize("make", (OURS | TORCHS).values(), ids=OURS | TORCHS)
def test_what_is_kept_is_known_before_a_step(make: Make) -> None:
    """Names, types, shapes, and for ours the precision, as after real steps; the optimizer does not notice."""
    model, optimizer = trained(make, 5)
    before = copy.deepcopy(optimizer.state_dict())
    step = getattr(type(optimizer), "step_alone", lambda twin: twin.step())
    found = layouts(optimizer, before["param_groups"], step)
    same(optimizer.state_dict(), before)
    assert len(found) == len(list(model.parameters()))
    for number, values in before["state"].items():
        layout = found[number]
        assert layout is not None and layout.values.keys() == layout.always == values.keys()
        for name, value in values.items():
            if isinstance(value, Tensor):
                assert layout.values[name].shape == value.shape and layout.values[name].dtype == value.dtype


SPOILS: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "has no": lambda values, name: {n: v for n, v in values.items() if n != name},
    "shape": lambda values, name: values | {name: torch.zeros(2, 5, 7)},
    "number": lambda values, name: values | {name: 3.0 if values[name].dim() else torch.zeros(2)},
    "str": lambda values, name: values | {name: "much"},
}


CHECKED = {name: make for name, make in (NAMED | LEVELS).items() if name not in ("adamw", "sgd")}  # torch's own
DAMAGES = [
    # Levels pass the state on to their optimizers, whatever is wrong with it.
    pytest.param(make, spoil, id=f"{name}, {spoil}", marks=pytest.mark.slow if name in LEVELS and i else ())
    for name, make in CHECKED.items()
    for i, spoil in enumerate(SPOILS)
]


@pytest.mark.parametrize(("make", "spoil"), DAMAGES)
def test_a_damaged_state_is_refused(make: Make, spoil: str) -> None:
    """Each tensor of each kind of parameter, alone."""
    _, optimizer = trained(make)
    saved = copy.deepcopy(optimizer.state_dict())
    kinds: dict[Any, tuple[int, str]] = {}
    for number, values in saved["state"].items():
        for name, value in values.items():
            # Without its only name a state is as that of a parameter that never stepped.
            if isinstance(value, Tensor) and not name.startswith("accumulated") and len(values) > 1:
                kinds.setdefault((name, value.dim()), (number, name))
    for number, name in kinds.values():
        state = saved["state"] | {number: SPOILS[spoil](saved["state"][number], name)}
        with pytest.raises(ValueError, match=rf"not one of \w+: of a parameter of shape .*{name}"):
            optimizer.load_state_dict(saved | {"state": state})
    same(optimizer.state_dict(), saved)


@pytest.mark.parametrize("make", LEVELS.values(), ids=LEVELS)
def test_damaged_sums_are_refused(make: Make) -> None:
    _, optimizer = trained(make)
    saved = copy.deepcopy(optimizer.state_dict())
    for number, values in saved["state"].items():
        for name in values.keys() & {"accumulated", "accumulated_inputs"}:
            for wrong in (torch.zeros(1, 1, 1, 1), 5):
                state = saved["state"] | {number: values | {name: wrong}}
                with pytest.raises(ValueError, match=rf"'{name}' of a parameter of shape .* in level 'slow'"):
                    optimizer.load_state_dict(saved | {"state": state})
    same(optimizer.state_dict(), saved)
    assert any(ACCUMULATED in values for values in saved["state"].values())


KEEP_LESS = "generalized_gradient_descent"
KEEP_NOTHING = {"delta_gradient_descent", "oja", KEEP_LESS}


@pytest.mark.parametrize("into", NAMES)
def test_the_state_of_another_optimizer_is_refused(into: str) -> None:
    """Whatever it is, unless it says nothing; nothing has changed then."""
    for name in NAMES:
        saved = saved_by(NAMED[name])
        _, optimizer = trained(NAMED[into])
        before = copy.deepcopy(optimizer.state_dict())
        # They keep nothing; the first two share their settings, and the third has fewer.
        if name == into or ({name, into} <= KEEP_NOTHING and (into == KEEP_LESS or name != KEEP_LESS)):
            optimizer.load_state_dict(saved)
            continue
        if into in ("adamw", "sgd"):
            continue  # torch's own affair, but at a level
        with pytest.raises(ValueError, match=r"not one of|parameter group"):
            optimizer.load_state_dict(saved)
        same(optimizer.state_dict(), before)


@pytest.mark.parametrize("into", NAMES)
def test_the_state_of_another_optimizer_is_refused_by_levels(into: str) -> None:
    """All levels are looked at before one is loaded."""
    for name in NAMES:
        if name == into or {name, into} <= KEEP_NOTHING:
            continue
        saved = saved_by(LEVELS[f"levels of {name}"])
        _, optimizer = trained(LEVELS[f"levels of {into}"])
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=r"not one of|levels \(name, period\)|parameters in groups of"):
            optimizer.load_state_dict(saved)
        same(optimizer.state_dict(), before)


def test_settings_may_change_while_it_runs() -> None:
    """A momentum that falls to 0 leaves its memory behind; one that is switched on has none before the next step."""
    for first, second in ((0.9, 0.0), (0.0, 0.9)):
        make = lambda model, first=first: PreconditionedMomentum(model.parameters(), 0.01, first)  # noqa: E731
        model, optimizer = trained(make)
        optimizer.param_groups[0]["momentum"] = second
        make(model).load_state_dict(optimizer.state_dict())
        model, optimizer = trained(lambda model, first=first: M3(model.parameters(), alpha=first))
        optimizer.param_groups[0]["alpha"] = second
        M3(model.parameters(), alpha=first).load_state_dict(optimizer.state_dict())


def test_a_state_of_another_precision_is_taken_in_the_own_one() -> None:
    """A run in float64 goes on in float32."""
    saved = saved_by(lambda model: DeltaMomentum(model.parameters()))
    model = Network(torch.float32)
    model.empty = nn.Parameter(torch.ones(1, 3))
    optimizer = DeltaMomentum(model.parameters())
    optimizer.load_state_dict(saved)
    loss_of(model, batch(0, dtype=torch.float32)).backward()
    optimizer.step()
    assert {s["momentum"].dtype for s in optimizer.state.values() if s} == {torch.float32}


def test_optimizers_that_cannot_be_tried_are_taken_at_their_word() -> None:
    """One of the user's that needs a closure, or that begins to keep something later."""

    class Strange(SGD):
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            self.state[self.param_groups[0]["params"][0]]["late"] = torch.zeros(3)
            super().step()
            return loss

    p = nn.Parameter(torch.zeros(2))
    levels = {"all": OptimizerLevel([p], optimizer=lambda some: Strange(some, lr=0.1, momentum=0.9))}
    optimizer = MultiFrequency(levels)
    optimizer.levels[0].optimizer.state[p] = {"late": torch.zeros(3), "momentum_buffer": torch.zeros(2)}
    MultiFrequency(levels).load_state_dict(optimizer.state_dict())
