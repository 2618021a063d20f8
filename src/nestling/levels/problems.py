"""Optimization problems that run, each at its own frequency (NL Definitions 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from nestling.optim.optimizer_level import Factory

Weights = dict[str, Tensor]
Solved = Mapping[str, Any]
"""What the problems in context came to, by name: weights or a solution, or with `history` the list of them; while a
context is read, what they are at the moment."""


class Rule(Protocol):
    """An update of fast weights: new weights and what the rule remembers (None at first)."""

    def __call__(self, weights: Weights, gradients: Weights, memory: Any) -> tuple[Weights, Any]: ...


def whole(batch: Any) -> Iterable[Any]:
    """The batch as the only item of a context."""
    return (batch,)


def descent(rate: float | Tensor) -> Rule:
    """Plain gradient descent, `w - rate * g`; the rate may be a parameter of a slower problem."""

    def rule(weights: Weights, gradients: Weights, memory: Any) -> tuple[Weights, Any]:
        return {n: w - rate * gradients[n] for n, w in weights.items()}, memory

    rule.__name__ = f"gradient descent, rate {rate:g}" if isinstance(rate, float) else "gradient descent, learned rate"
    return rule


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One optimization problem (objective, context, parameters), in one of three ways to be solved:

    - in the stream: `parameters` and a `torch.optim` optimizer; they persist from step to step, and every `period`
      steps take the gradients summed since (`MultiFrequency`). Neighbours with the same `objective` are in one gradient
      flow: one backward pass, taken before any of them moves (transfer by backpropagation). With an objective of its
      own a problem sees what the problems before it have just become (Definition 2's order among equals).
    - in context: `start` and a `rule`; the weights live for one step, begin at what `start` returns (parameters:
      transfer by initialisation; the output of a network: by generation) and learn from the items of the context, every
      `period` of them. The problems in the stream differentiate through all of it.
    - non-parametric: `solution` gives the minimiser of the objective for every item of the context, a query. Nothing is
      held from one item to the next, so its frequency is infinite (NL section 3.2; attention, Eq. 62-63).

    Problems in context read their contexts one after the other, in the given order, unless they say otherwise:

    - `beside`: they read one context together, item by item, so that they can interact at every token. A problem then
      sees the others as they were before the item; those whose `feeds` name it, as they are after it.
    - `inside`: the inner problems are solved anew within every item of this one's context, for example from its weights
      of the moment (NL Eq. 72); to any depth.

    Attributes:
        name: of the problem, and of its weights in what the objectives are given.
        objective: of a context item (in the stream: of the batch) and the solved problems to a scalar to minimise; in
            context the own weights of the moment are among the solved under the problem's name.
        parameters: in the stream: a module or tensors.
        optimizer: in the stream: makes the optimizer, `partial(torch.optim.SGD, lr=0.1)`.
        start: in context: of the batch and the problems solved before to the first weights.
        rule: in context: the update; gradient descent at rate 0.1 by default, as in MAML's regression.
        solution: non-parametric: of an item and the solved problems to the minimiser of the objective.
        context: in context: the items of a batch, one after the other; by default the batch is the one item.
        given: in context: of an item and the weights of the moment, the own included, to what the objective takes for
            an item. The own gradient takes it as given and does not pass through it; the gradients of slower problems
            do. Self-generated keys, values and targets are made here (NL Eq. 83-84).
        period: steps, or items, between two updates.
        beside: in context: name of an earlier problem whose items this one reads with it.
        inside: in context: problems within every item, which is their batch.
        through: in context, with `inside`: the own gradient runs through the inner problems' learning. Without, what
            they have become counts as given (the first-order meta-gradient).
        history: in context: hand on the weights before the first item and after every one, not the last alone;
            non-parametric: the solutions of all items. Problems inside another always hand on a list, one entry for
            every item of that.
        differentiable: in context: gradients through the updates. Without, the first-order approximation.
        goal, flow, feeds: for tables and pictures: the objective in words, what the context is made of, and the names
            of problems of equal frequency that need this one's result.
        span, per_step: for the order of levels: tokens (or samples) in an item of the context, and items that pass in
            one optimizer step, None if that is not known.

    Raises:
        ValueError: a problem that is not well defined; the message says what is missing.
    """

    name: str
    objective: Callable[[Any, Solved], Tensor]
    parameters: nn.Module | Iterable[Tensor] = ()
    optimizer: Factory | None = None
    start: Callable[[Any, Solved], Weights] | None = None
    rule: Rule = field(default_factory=lambda: descent(0.1))
    solution: Callable[[Any, Solved], Tensor] | None = None
    context: Callable[[Any], Iterable[Any]] = whole
    given: Callable[[Any, Solved], Any] | None = None
    period: int = 1
    beside: str = ""
    inside: Sequence[Problem] = ()
    through: bool = True
    history: bool = False
    differentiable: bool = True
    goal: str = "its own"
    flow: Literal["tokens", "gradients", "samples"] = "samples"
    feeds: tuple[str, ...] = ()
    span: int = 1
    per_step: int | None = None

    def __post_init__(self) -> None:
        given = self.parameters.parameters() if isinstance(self.parameters, nn.Module) else self.parameters
        object.__setattr__(self, "parameters", tuple(given))
        ways = [bool(self.parameters), self.start is not None, self.solution is not None]
        if sum(ways) != 1:
            raise ValueError(
                f"problem {self.name!r} needs either parameters (it learns in the stream), start (in context) or "
                "solution (non-parametric), and only one of them"
            )
        if self.parameters and self.optimizer is None:
            raise ValueError(f"problem {self.name!r} needs an optimizer, for example partial(torch.optim.SGD, lr=0.1)")
        for word in ("period", "span"):
            if getattr(self, word) < 1:
                raise ValueError(f"the {word} of problem {self.name!r} must be at least 1, not {getattr(self, word)}")
        if self.start is None and (self.inside or self.given is not None):
            raise ValueError(f"problem {self.name!r} does not learn in context, so inside and given have no meaning")
        if self.beside and (self.parameters or self.context is not whole):
            raise ValueError(
                f"problem {self.name!r} reads the context of {self.beside!r}: it learns in context and has none itself"
            )
        if any(p.parameters for p in self.inside):
            raise ValueError(f"problems inside {self.name!r} live for one of its items, so none can be in the stream")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters in the stream."""
        return tuple(self.parameters)  # type: ignore[arg-type]  # a tuple since __post_init__

    def size(self) -> tuple[int, int]:
        """Numbers and bytes of the parameters; fast weights are not known before a step."""
        return sum(t.numel() for t in self.tensors), sum(t.numel() * t.element_size() for t in self.tensors)

    def rule_text(self) -> str:
        """The learning rule in a few words."""
        if self.solution is not None:
            return "solved for every item"
        made = self.optimizer if self.start is None else self.rule
        inner = getattr(made, "func", made)
        options = [f"{k} {v:g}" for k, v in getattr(made, "keywords", {}).items() if isinstance(v, int | float) and v]
        return ", ".join([getattr(inner, "__name__", type(inner).__name__), *options])

    def family(self) -> Iterator[Problem]:
        """The problem and all that are inside it, the innermost first."""
        for problem in self.inside:
            yield from problem.family()
        yield self


def context_flows(problems: Sequence[Problem]) -> list[list[Problem]]:
    """Problems that read one context together, in the order in which contexts are read.

    Raises:
        ValueError: `beside` names no earlier problem with a context of its own, or a problem comes before one whose
            `feeds` name it.
    """
    flows: dict[str, list[Problem]] = {}
    for problem in problems:
        if not problem.beside:
            flows[problem.name] = [problem]
            continue
        if problem.beside not in flows:
            raise ValueError(
                f"problem {problem.name!r} is beside {problem.beside!r}, which is no earlier problem with a context"
            )
        flow = flows[problem.beside]
        if late := [p.name for p in flow if p.name in problem.feeds]:
            raise ValueError(f"problem {problem.name!r} feeds {late[0]!r} at the same item, so list it first")
        flow.append(problem)
    return list(flows.values())
