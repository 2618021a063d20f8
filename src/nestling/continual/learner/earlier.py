"""What a learner's memory was taught in earlier studies: adapters that speak, and learn no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from nestling.continual.learner.weights import LowRankWeights
from nestling.continual.store.adapters import Adapter
from nestling.continual.store.applying import layers_of
from nestling.continual.store.records import LowRank
from nestling.continual.store.scope_gate import Scoped, ScopeGate

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner


class EarlierAdapters:
    """The adapters of finished studies, on a model.

    Args:
        model: the learner's.
        beside: the gates on it.
    """

    def __init__(self, model: nn.Module, beside: list[ScopeGate]) -> None:
        self.model, self.beside, self.attached = model, beside, True
        self.adapters: tuple[Adapter, ...] = ()
        self._on: tuple[Scoped, ...] = ()

    def replace(self, adapters: Sequence[Adapter]) -> None:
        """Others in their place; raises MemoryUseError as `layers_of`, with nothing changed."""
        made = tuple(Scoped(layers_of(self.model, each), each.scope, self.beside) for each in adapters)
        attached = self.attached
        self.detach()
        self.adapters, self._on = tuple(adapters), made
        if attached:
            self.attach()

    def attach(self) -> None:
        """Hooks on."""
        for each in self._on if not self.attached else ():
            each.attach(self.model)
        self.attached = True

    def detach(self) -> None:
        """Hooks off."""
        for each in self._on:
            each.detach()
        self.attached = False


def open_adapter(learner: Learner) -> Callable[[], None]:
    """What the learner learns now is an earlier adapter from here on, and it begins another one.

    Returns:
        what undoes that, to the last bit.
    """
    assert learner.scope is not None
    scope, earlier = learner.scope, learner.earlier.adapters
    values = [p.detach().clone() for p in learner.everything]
    own = {name: d for each in learner.weights.values() for name, d in each.differences().items()}
    low = {name: d for name, d in own.items() if isinstance(d, LowRank)}
    learner.earlier.replace([*learner.earlier.adapters, Adapter(learner.scope, low)])
    for weights in learner.weights.values():
        if isinstance(weights, LowRankWeights):
            weights.start_again()

    @torch.no_grad()
    def undo() -> None:
        learner.earlier.replace(earlier)
        for p, value in zip(learner.everything, values, strict=True):
            p.copy_(value)
        learner.set_scope(scope)

    return undo
