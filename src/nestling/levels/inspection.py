"""`inspect`: the nested system that a model and its optimizer are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from torch import Tensor, nn
from torch.optim import Optimizer

from nestling.levels.components import Component, Frequency, Transfer, TransferKind
from nestling.levels.model_memories import MemoryPart, find_memories
from nestling.levels.naming import group_parameters
from nestling.levels.optimizer_memories import OptimizerPart, find_optimizer_states
from nestling.levels.system import NestedSystem

RECALLED = "what it recalls"


def inspect(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    objective: str | None = None,
    tokens_per_step: int | None = None,
    restart: int | None = None,
) -> NestedSystem:
    """Levels, components and knowledge transfers of any model with any optimizer (NL section 3).

    Everything is read from the objects. Layers of this package describe their memories (`DescribesMemories`); softmax
    attention and recurrent networks of others are known by their type and projections; what an optimizer keeps, how
    often and from what, is found by letting a twin of it step on a small matrix (`levels.probe`). Neither the model nor
    the optimizer is changed.

    Args:
        model: any module.
        optimizer: over its parameters; None for a model that is only used, whose parameters have frequency 0.
        objective: what the training minimises; None takes the loss a Hugging Face model names, or "the training loss".
        tokens_per_step: tokens that a row reads between two steps of the optimizer (not those of the whole batch: every
            row has memories of its own). On that clock what is updated by the token and what is updated by the step are
            compared; None does not know it, and a note says when the order is right.
        restart: tokens after which a row's memories start anew: its length, where no state is carried on. A note names
            the memories whose period is no shorter, since none of their updates is ever read. None: they go on.

    Raises:
        ValueError: the optimizer has parameters that are not the model's, or `tokens_per_step` is below 1.

    Examples:
        >>> import torch
        >>> from nestling.levels import inspect
        >>> model = torch.nn.Linear(8, 4)
        >>> system = inspect(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        >>> [[component.kind for component in level.components] for level in system.levels]
        [['optimizer state'], ['parameters']]
    """
    if tokens_per_step is not None and tokens_per_step < 1:
        raise ValueError(f"tokens_per_step must be at least 1, or None if it is not known; got {tokens_per_step}")
    names = {id(p): name for name, p in model.named_parameters()}
    parts = [] if optimizer is None else find_optimizer_states(optimizer)
    strangers = [p for part in parts for p in part.parameters if id(p) not in names]
    if strangers:
        raise ValueError(
            f"the optimizer has {len(strangers)} parameters that are not this model's, the first of shape "
            f"{tuple(strangers[0].shape)}; inspect a module that holds them all"
        )
    builder = _Builder(model, names, objective or _loss_name(model))
    for part in parts:
        builder.add_part(part)
    builder.add_frozen(optimizer)
    for memory in find_memories(model):
        if memory.component.frequency.unit == "token":
            frequency = replace(memory.component.frequency, per_step=tokens_per_step)
            memory.component = replace(memory.component, frequency=frequency)
        builder.add_memory(memory)
    builder.join_gradient_flow()
    builder.let_steps_wait()
    if restart is not None:
        builder.note_unread(restart)
    title = type(model).__name__
    if optimizer is not None:
        inner = sorted({type(part.optimizer).__name__ for part in parts})
        wrapped = f" of {', '.join(inner)}" if [type(optimizer).__name__] != inner else ""
        title += f" with {type(optimizer).__name__}{wrapped}"
    return NestedSystem.of(title, builder.components, builder.transfers, builder.notes)


class _Builder:
    """Collects components and transfers; `owner` says which component holds a parameter."""

    def __init__(self, model: nn.Module, names: dict[int, str], objective: str) -> None:
        self.model, self.names, self.objective = model, names, objective
        self.parameters = dict(model.named_parameters())
        self.components: list[Component] = []
        self.transfers: list[Transfer] = []
        self.notes: list[str] = []
        self.owner: dict[str, str] = {}
        self.flows: list[tuple[int, list[str]]] = []

    def add_part(self, part: OptimizerPart) -> None:
        """Parameters of one period, with the memories of their gradients."""
        members = [self.names[id(p)] for p in part.parameters]
        made = self._add_parameters(members, Frequency("step", part.period), part.rule_text(), part.label)
        states = [s.name for s in part.states]
        for state in part.states:
            feeds = state.feeds + (tuple(made) if state.name in part.feeds_parameters else ())
            self.components.append(replace(state, feeds=feeds))
        self.notes += part.notes
        self.flows.append((part.period, made))
        if part.total is not None:
            self.components.append(part.total)
            self._connect(made, [part.total.name], "generation", "gradients")
            self._connect([part.total.name], states or made, "generation", "summed gradients")
        else:
            self._connect(made, states, "generation", "gradients")
        self._connect(part.feeds_parameters, made, "parametric", "update")
        for state_name, fed in part.feeds_states.items():
            self._connect([state_name], fed, "parametric", "state")

    def add_frozen(self, optimizer: Optimizer | None) -> None:
        """The parameters no optimizer has."""
        left = [name for name in self.parameters if name not in self.owner]
        if left:
            rule = "no optimizer" if optimizer is None else "not in the optimizer"
            self._add_parameters(left, Frequency("never"), rule, "frozen")

    def add_memory(self, memory: MemoryPart) -> None:
        """A memory of the context, and what passes between it and the parameters around it."""
        component, description = memory.component, memory.description
        self.components.append(component)
        around = self._owners([n for path in memory.paths for n in self._inside(_join(path, description.part))])
        initial = self._owners([_join(path, n) for path in memory.paths for n in description.initial])
        parametric = description.period is not None
        inputs = "keys, values, rates" if parametric else "keys, values"
        self._connect(around, [component.name], "generation", inputs)
        if not description.feeds:  # what feeds another memory is not read itself
            kind: TransferKind = "parametric" if parametric else "non-parametric"
            self._connect([component.name], around, kind, RECALLED)
        self._connect(initial, [component.name], "initialisation", "first fast weights")
        self._connect([component.name], component.feeds, "parametric", "surprise" if description.feeds else RECALLED)
        made = [memory.name_of(n) for n in description.generates]
        self._connect([component.name], made, "generation", "keys, values, rates, targets")
        if description.restarts is not None:
            above = memory.name_of(description.restarts)
            self._connect([above], [component.name], "initialisation", "state at the end of its context")

    def join_gradient_flow(self) -> None:
        """Backpropagation runs through all trained parameters; those of different periods are different levels."""
        periods = sorted({period for period, _ in self.flows})
        for fast, slow in pairwise(periods):
            sources = [n for period, names in self.flows if period == slow for n in names]
            targets = [n for period, names in self.flows if period == fast for n in names]
            self._connect(sources, targets, "backpropagation", "errors")

    def let_steps_wait(self) -> None:
        """A gradient has read the memories: at equal frequency they come before all that is updated by the step."""
        waiting = tuple(c.name for c in self.components if c.frequency.unit == "step")
        self.components = [
            replace(c, feeds=(*c.feeds, *waiting)) if c.kind == "fast weights" else c for c in self.components
        ]

    def note_unread(self, restart: int) -> None:
        """Memories whose first update comes when their row ends."""
        for c in self.components:
            if c.kind == "fast weights" and c.frequency.period >= restart:
                self.notes.append(
                    f"{c.name} is updated every {c.frequency.period:,} tokens, and its rows start anew after "
                    f"{restart:,}: training never reads an update of it; make rows longer or the period shorter, or "
                    "carry the state on"
                )

    def _add_parameters(self, members: Sequence[str], frequency: Frequency, rule: str, label: str) -> list[str]:
        made = []
        taken = {c.name for c in self.components}
        for name, group in group_parameters(self.model, members).items():
            unique = f"{name} ({label})" if name in taken else name
            tensors: list[Tensor] = [self.parameters[n] for n in group]
            self.components.append(
                Component(
                    name=unique,
                    kind="parameters",
                    frequency=frequency,
                    context="samples",
                    objective=self.objective,
                    rule=rule,
                    parameters=sum(t.numel() for t in tensors),
                    parameter_bytes=sum(t.numel() * t.element_size() for t in tensors),
                )
            )
            self.owner |= dict.fromkeys(group, unique)
            made.append(unique)
        return made

    def _inside(self, path: str) -> list[str]:
        return [n for n in self.parameters if n.startswith(f"{path}.") or not path]

    def _owners(self, parameters: Sequence[str]) -> list[str]:
        """Components of the parameters, without those of vectors where there are matrices."""
        matrices = [n for n in parameters if n in self.owner and self.parameters[n].dim() >= 2]
        return list(dict.fromkeys(self.owner[n] for n in (matrices or parameters) if n in self.owner))

    def _connect(self, sources: Sequence[str], targets: Sequence[str], kind: TransferKind, what: str) -> None:
        self.transfers += [Transfer(s, t, kind, what) for s in sources for t in targets if s != t]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _loss_name(model: nn.Module) -> str:
    """What a Hugging Face model says its loss is."""
    kind = getattr(model, "loss_type", None)
    if isinstance(kind, str):
        return {"ForCausalLM": "next-token cross entropy"}.get(kind, f"{kind} loss")
    return "the training loss"
