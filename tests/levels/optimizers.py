"""Optimizers whose states are known, to be found out by experiment."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class TwoSpeeds(Optimizer):
    """A fast momentum with decay, a slow one every `period` steps from the sum of gradients, and a filter on the fast.

    The filter is a line in the fast momentum and no line in the gradient alone.
    """

    def __init__(self, parameters: Any, lr: float = 0.1, period: int = 5) -> None:
        super().__init__(parameters, {"lr": lr, "period": period})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {n: torch.zeros_like(p) for n in ("fast", "slow", "waiting", "filtered")}
                    state["count"] = 0
                state["count"] += 1
                state["fast"].mul_(0.8).add_(p.grad, alpha=0.2)
                state["waiting"].add_(p.grad)
                if state["count"] % group["period"] == 0:
                    state["slow"].mul_(0.5).add_(state["waiting"], alpha=-3.0)
                    state["waiting"].zero_()
                state["filtered"].mul_(0.9).add_(state["fast"])
                p.sub_(group["lr"] * (state["filtered"] + state["slow"]))


class Rigid(Optimizer):
    """Works for its own parameters only."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.own = {id(p) for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if id(p) not in self.own:
                raise RuntimeError("not my parameter")
            self.state[p].setdefault("trace", torch.zeros_like(p)).add_(p.grad)
            p.sub_(self.state[p]["trace"])
