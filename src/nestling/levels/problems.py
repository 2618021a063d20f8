"""Optimization problems that run, each at its own frequency (NL Definitions 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from nestling.optim import MultiFrequency, OptimizerLevel
from nestling.optim.multi_frequency import Factory

Weights = dict[str, Tensor]
Solved = Mapping[str, Any]
"""What the problems in context came to, by name: weights, or with `history` the list of them."""


class Rule(Protocol):
    """An update of fast weights: new weights and what the rule remembers (None at first)."""

    def __call__(self, weights: Weights, gradients: Weights, memory: Any) -> tuple[Weights, Any]: ...


def descent(rate: float | Tensor) -> Rule:
    """Plain gradient descent, `w - rate * g`; the rate may be a parameter of a slower problem."""

    def rule(weights: Weights, gradients: Weights, memory: Any) -> tuple[Weights, Any]:
        return {n: w - rate * gradients[n] for n, w in weights.items()}, memory

    rule.__name__ = f"gradient descent, rate {rate:g}" if isinstance(rate, float) else "gradient descent, learned rate"
    return rule


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One optimization problem (objective, context, parameters), in one of the two ways to learn:

    - in the stream: `parameters` and a `torch.optim` optimizer; they persist from step to step, and every `period`
      steps take the gradients summed since (`MultiFrequency`). Neighbours with the same `objective` are in one gradient
      flow: one backward pass, taken before any of them moves (transfer by backpropagation). With an objective of its
      own a problem sees what the problems before it have just become (Definition 2's order among equals).
    - in context: `start` and a `rule`; the weights live for one step, begin at what `start` returns (parameters:
      transfer by initialisation; the output of a network: by generation) and learn from the items of the context, every
      `period` of them. The problems in the stream differentiate through all of it.

    Attributes:
        name: of the problem, and of its weights in what the objectives are given.
        objective: of a context item (in the stream: of the batch) and the solved problems to a scalar to minimise; in
            context the own weights of the moment are among the solved under the problem's name.
        parameters: in the stream: a module or tensors.
        optimizer: in the stream: makes the optimizer, `partial(torch.optim.SGD, lr=0.1)`.
        start: in context: of the batch and the problems solved before to the first weights.
        rule: in context: the update; gradient descent at rate 0.1 by default, as in MAML's regression.
        context: in context: the items of a batch, one after the other; by default the batch is the one item.
        period: steps, or items, between two updates.
        history: in context: hand on the weights before the first item and after every one, not the last alone.
        differentiable: in context: gradients through the updates. Without, the first-order approximation.
        goal, flow, feeds: for tables and pictures: the objective in words, what the context is made of, and the names
            of problems of equal frequency that need this one's result.
    """

    name: str
    objective: Callable[[Any, Solved], Tensor]
    parameters: nn.Module | Iterable[Tensor] = ()
    optimizer: Factory | None = None
    start: Callable[[Any, Solved], Weights] | None = None
    rule: Rule = field(default_factory=lambda: descent(0.1))
    context: Callable[[Any], Iterable[Any]] = lambda batch: (batch,)
    period: int = 1
    history: bool = False
    differentiable: bool = True
    goal: str = "its own"
    flow: Literal["tokens", "gradients", "samples"] = "samples"
    feeds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = self.parameters.parameters() if isinstance(self.parameters, nn.Module) else self.parameters
        object.__setattr__(self, "parameters", tuple(given))
        if (self.start is None) != bool(self.parameters):
            raise ValueError(
                f"problem {self.name!r} needs either parameters (it learns in the stream) or start (in context)"
            )
        if self.start is None and self.optimizer is None:
            raise ValueError(f"problem {self.name!r} needs an optimizer, for example partial(torch.optim.SGD, lr=0.1)")
        if self.period < 1:
            raise ValueError(f"the period of problem {self.name!r} must be at least 1, not {self.period}")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters in the stream."""
        return tuple(self.parameters)  # type: ignore[arg-type]  # a tuple since __post_init__

    def size(self) -> tuple[int, int]:
        """Numbers and bytes of the parameters; fast weights are not known before a step."""
        return sum(t.numel() for t in self.tensors), sum(t.numel() * t.element_size() for t in self.tensors)

    def rule_text(self) -> str:
        """The learning rule in a few words."""
        made = self.optimizer if self.start is None else self.rule
        inner = getattr(made, "func", made)
        options = [f"{k} {v:g}" for k, v in getattr(made, "keywords", {}).items() if isinstance(v, int | float) and v]
        return ", ".join([getattr(inner, "__name__", type(inner).__name__), *options])


class Runner:
    """Runs problems: first those in context, then those in the stream, each group in the given order.

    Attributes:
        optimizers: of the problems in the stream, for checkpoints and schedulers.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        if not problems:
            raise ValueError("a system needs at least one problem")
        self.inside = [p for p in problems if p.start is not None]
        stream = [p for p in problems if p.start is None]
        self.flows = [list(flow) for _, flow in groupby(stream, key=lambda p: p.objective)]
        self.optimizers = [
            MultiFrequency({p.name: OptimizerLevel(p.tensors, p.period, p.optimizer) for p in flow})
            for flow in self.flows
        ]

    def step(self, batch: Any) -> dict[str, float]:
        """See `NestedSystem.step`."""
        losses: dict[str, float] = {}
        if not self.flows:
            self._solve(batch, losses)
        for flow, optimizer in zip(self.flows, self.optimizers, strict=True):
            # Anew for every flow: the one before may have moved the parameters this one differentiates through.
            loss = flow[0].objective(batch, self._solve(batch, losses))
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
        return self._solve(batch, {})

    def _solve(self, batch: Any, losses: dict[str, float]) -> dict[str, Any]:
        solved: dict[str, Any] = {}
        for problem in self.inside:
            assert problem.start is not None
            weights = {
                n: w if w.requires_grad else w.detach().requires_grad_()
                for n, w in problem.start(batch, solved).items()
            }
            path: list[Weights] = [weights]
            memory: Any = None
            waiting: list[Any] = []
            for item in problem.context(batch):
                waiting.append(item)
                if len(waiting) == problem.period:
                    weights, memory, losses[problem.name] = _update(problem, weights, memory, waiting, solved)
                    waiting = []
                path.append(weights)
            solved[problem.name] = path if problem.history else weights
        return solved


def _update(
    problem: Problem, weights: Weights, memory: Any, items: Sequence[Any], solved: Solved
) -> tuple[Weights, Any, float]:
    """One update of fast weights with the gradients of several items, all taken at the weights before it (Eq. 71)."""
    with torch.enable_grad():
        loss = torch.stack([problem.objective(item, {**solved, problem.name: weights}) for item in items]).sum()
        kept = problem.differentiable
        found = torch.autograd.grad(loss, list(weights.values()), create_graph=kept, allow_unused=True)
        pairs = zip(weights.items(), found, strict=True)
        gradients = {n: torch.zeros_like(w) if g is None else g for (n, w), g in pairs}
        weights, memory = problem.rule(weights, gradients, memory)
    return weights, memory, float(loss.detach())
