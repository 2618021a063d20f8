"""Problems at work: contexts are read item by item, then the stream takes its step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from nestling.levels.problems import Problem, Solved, Weights, context_flows
from nestling.optim import MultiFrequency, OptimizerLevel


class Runner:
    """Runs problems: first those that are solved within a batch, then those in the stream, each in the given order.

    Attributes:
        optimizers: of the problems in the stream, for checkpoints and schedulers.

    Raises:
        ValueError: no problem, or problems that cannot read one context together.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        if not problems:
            raise ValueError("a system needs at least one problem")
        self.inside = [p for p in problems if not p.tensors]
        stream = [p for p in problems if p.tensors]
        for problem in self.inside:
            for inner in problem.family():
                context_flows(inner.inside)
        context_flows(self.inside)
        self.flows = [list(flow) for _, flow in groupby(stream, key=lambda p: p.objective)]
        self.optimizers = [
            MultiFrequency({p.name: OptimizerLevel(p.tensors, p.period, p.optimizer) for p in flow})
            for flow in self.flows
        ]

    def step(self, batch: Any) -> dict[str, float]:
        """See `NestedSystem.step`."""
        losses: dict[str, float] = {}
        if not self.flows:
            solve(self.inside, batch, {}, losses)
        for flow, optimizer in zip(self.flows, self.optimizers, strict=True):
            # Anew for every flow: the one before may have moved the parameters this one differentiates through.
            loss = flow[0].objective(batch, solve(self.inside, batch, {}, losses))
            tensors = [t for problem in flow for t in problem.tensors]
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
            for t, gradient in zip(tensors, gradients, strict=True):
                t.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
            losses |= dict.fromkeys((p.name for p in flow), float(loss.detach()))
        return losses

    def solve(self, batch: Any) -> Solved:
        """What the problems in context come to on a batch, without any change: for evaluation."""
        return solve(self.inside, batch, {}, {})


def solve(problems: Sequence[Problem], batch: Any, around: Solved, losses: dict[str, float]) -> dict[str, Any]:
    """What problems in context come to on a batch; their objectives go into `losses`.

    Args:
        problems: of one place: those of a system, or those inside one of its problems.
        batch: theirs, or the item of the problem around them.
        around: what that problem and those beside and before it are at the moment.
        losses: is extended.
    """
    found: dict[str, Any] = {}
    for flow in context_flows(problems):
        readers = {p.name: Reader(p, batch, {**around, **found}) for p in flow}
        for item in flow[0].context(batch):
            before = {name: reader.weights for name, reader in readers.items()}
            for problem in flow:
                # Definition 2: one that feeds this one has its state of this very item, the others that of the last.
                now = {p.name: readers[p.name].weights for p in flow if problem.name in p.feeds}
                readers[problem.name].read(item, {**around, **found, **before, **now}, losses)
            for reader in readers.values():
                reader.path.append(reader.weights)
        for name, reader in readers.items():
            found |= reader.inner
            found[name] = reader.result()
    return found


class Reader:
    """A problem on its way through a context.

    Attributes:
        weights: of the moment; of a non-parametric problem the solution for the last item, None before the first.
        path: before the first item and after every one.
        inner: what the problems inside came to, a list with an entry for every item.
    """

    def __init__(self, problem: Problem, batch: Any, solved: Solved) -> None:
        self.problem = problem
        self.weights: Any = None
        if problem.start is not None:
            first = problem.start(batch, solved)
            self.weights = {n: w if w.requires_grad else w.detach().requires_grad_() for n, w in first.items()}
        self.path = [self.weights]
        self.inner: dict[str, list[Any]] = {p.name: [] for q in problem.inside for p in q.family()}
        self._memory: Any = None
        self._held: Weights = {}
        self._waiting: list[Tensor] = []

    def result(self) -> Any:
        """What is handed on."""
        if not self.problem.history:
            return self.weights
        return self.path if self.problem.solution is None else self.path[1:]

    def read(self, item: Any, solved: Solved, losses: dict[str, float]) -> None:
        """One item: the loss at the weights, and at the end of a period the update."""
        p = self.problem
        with torch.enable_grad():
            if p.solution is not None:
                self.weights = p.solution(item, solved)
                losses[p.name] = float(p.objective(item, {**solved, p.name: self.weights}).detach())
                return
            if not self._waiting:
                # Views, so that what has been made from the weights (`given`) is not differentiated by them.
                self._held = {n: w.view_as(w) for n, w in self.weights.items()}
            own = {p.name: self._held}
            data = item if p.given is None else p.given(item, solved)
            inner = solve(p.inside, item, {**solved, **(own if p.through else {})}, losses)
            for name, value in inner.items():
                self.inner[name].append(value)
            self._waiting.append(p.objective(data, {**solved, **inner, **own}))
            if len(self._waiting) == p.period:
                losses[p.name] = self._update()

    def _update(self) -> float:
        """With the gradients of a period, all taken at the weights before it (Eq. 71)."""
        loss = torch.stack(self._waiting).sum()
        held, kept = self._held, self.problem.differentiable
        found = torch.autograd.grad(loss, list(held.values()), create_graph=kept, retain_graph=True, allow_unused=True)
        pairs = zip(held.items(), found, strict=True)
        gradients = {n: torch.zeros_like(w) if g is None else g for (n, w), g in pairs}
        self.weights, self._memory = self.problem.rule(self.weights, gradients, self._memory)
        self._waiting = []
        return float(loss.detach())
