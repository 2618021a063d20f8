"""Two optimizers of `torch.optim` as one: each takes the groups that suit it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim import Optimizer


class SideBySide(Optimizer):
    """Optimizers that share one list of groups and one state, so that schedulers, checkpoints and trainers see one.

    `torch.optim.Muon` takes matrices only and needs AdamW beside it; `build("muon", ...)` makes that pair. State per
    parameter: that of the optimizer that steps it.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        """Args: the optimizers, whose state is still empty.

        Raises:
            ValueError: none is given, or one has taken steps already.
        """
        if not optimizers or any(o.state for o in optimizers):
            raise ValueError("SideBySide joins one or more optimizers that have not stepped yet")
        self.optimizers = optimizers
        self.counts = [len(o.param_groups) for o in optimizers]
        super().__init__([group for o in optimizers for group in o.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's; `load_state_dict` comes through here and makes new groups."""
        super().__setstate__(state)
        self._share()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of each; the closure is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def _share(self) -> None:
        start = 0
        for optimizer, count in zip(self.optimizers, self.counts, strict=True):
            optimizer.param_groups = self.param_groups[start : start + count]
            optimizer.state = self.state
            start += count
