"""The memories inside a model: those its layers describe, and attention and recurrence in anybody's modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from nestling.levels.components import Component, Frequency
from nestling.levels.naming import pattern_of
from nestling.memory.description import DescribesMemories, MemoryDescription
from nestling.models.modeling import NestlingPreTrainedModel

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("to_q", "to_k", "to_v"), ("q", "k", "v"))
FUSED = ("qkv_proj", "c_attn", "qkv", "Wqkv", "query_key_value", "in_proj", "att_proj")


@dataclass
class MemoryPart:
    """A memory of the model, in all the blocks that have it and in one loop over them.

    Attributes:
        component: its description in the system.
        description: what the layer said.
        paths: of the modules that hold it.
    """

    component: Component
    description: MemoryDescription
    paths: list[str] = field(default_factory=list)

    def name_of(self, other: str) -> str:
        """Component name of another memory of the same module, in the same loop."""
        before, after = self.component.name.rsplit(self.description.name, 1)
        return before + other + after


def find_memories(model: nn.Module) -> list[MemoryPart]:
    """All memories of a model, equal ones of different blocks as one part, those of different loops as several.

    Blocks that run several times (`nestling.models.looping`) have a state in every loop, and a loop's memories learn
    from what those of the loop before recall: by NL Definition 2 they are the slower level at an equal frequency.
    """
    groups: dict[tuple[object, ...], list[tuple[str, nn.Module, MemoryDescription]]] = {}
    for path, module, memory in _walk(model):
        key = (pattern_of(model, path), memory.name, memory.period, memory.objective, memory.rule)
        groups.setdefault(key, []).append((path, module, memory))
    parts: list[MemoryPart] = []
    loops = _loops(model)
    taken: set[str] = set()
    for (pattern, *_), members in groups.items():
        prefix = f"{pattern} " if pattern else ""
        name = f"{prefix}{members[0][2].name}"
        if name in taken:  # blocks with other settings
            name = f"{members[0][0]} {members[0][2].name}"
        taken.add(name)
        suffixes = [_suffix(loop) for loop in range(loops)] if loops > 1 else [""]
        parts += [_part(members, name, prefix, suffix) for suffix in suffixes]
    for loop in range(loops - 1):
        then = tuple(part.component.name for part in parts if part.component.name.endswith(_suffix(loop + 1)))
        for part in parts:  # what feeds another memory is not read itself
            if part.component.name.endswith(_suffix(loop)) and not part.description.feeds:
                part.component = replace(part.component, feeds=then)
    return parts


def _suffix(loop: int) -> str:
    return f" (loop {loop + 1})"


def _part(members: list[tuple[str, nn.Module, MemoryDescription]], name: str, prefix: str, suffix: str) -> MemoryPart:
    """The memory of equal modules, in one loop, which is the suffix of its name."""
    memory = members[0][2]
    state = sum(m.state for _, _, m in members)
    component = Component(
        name=f"{name}{suffix}",
        kind="attention" if memory.period is None else "fast weights",
        frequency=Frequency("query") if memory.period is None else Frequency("token", memory.period),
        context="tokens",
        objective=memory.objective,
        rule=memory.rule,
        copies=len(members),
        state=state,
        state_bytes=state * _bytes(members[0][1]),
        growth=sum(m.growth for _, _, m in members),
        feeds=tuple(f"{prefix}{other}{suffix}" for other in memory.feeds),
    )
    return MemoryPart(component, memory, [path for path, _, _ in members])


def _loops(model: nn.Module) -> int:
    """How often the blocks of the model, or of the one that is wrapped in it, run."""
    return next((int(m.config.loops) for m in model.modules() if isinstance(m, NestlingPreTrainedModel)), 1)


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, MemoryDescription]]:
    for path, module in model.named_modules():
        if isinstance(module, DescribesMemories):
            described: DescribesMemories = module
            for memory in described.describe_memories():
                yield path, model.get_submodule(path), memory
        elif (known := _foreign(module)) is not None:
            yield path, module, known


def _foreign(module: nn.Module) -> MemoryDescription | None:
    """A memory known by a module's type or shape: softmax attention, or the hidden state of a recurrent network."""
    if isinstance(module, nn.RNNBase):
        states = module.num_layers * (2 if module.bidirectional else 1) * (2 if isinstance(module, nn.LSTM) else 1)
        return MemoryDescription(
            name="hidden state",
            period=1,
            objective="none: a recurrence by hand",
            rule=f"{module.mode} cell",
            state=states * module.hidden_size,
        )
    width = _attention_width(module)
    if width is None:
        return None
    return MemoryDescription(
        name="attention",
        period=None,
        objective="Σ s(k, q) |v − M|²",
        rule="solved for every query: softmax attention",
        state=0,
        growth=width,
    )


def _attention_width(module: nn.Module) -> int | None:
    """Numbers of a token's key and value, if the module is softmax attention.

    That is `nn.MultiheadAttention`, or a class whose name says attention (and not linear attention) with projections
    for queries, keys and values under one of the usual names.
    """
    if isinstance(module, nn.MultiheadAttention):
        return 2 * module.embed_dim
    name = type(module).__name__.lower()
    if "attention" not in name or "linear" in name:
        return None
    for _, key, value in PROJECTIONS:
        pair = [_outputs(getattr(module, n, None)) for n in (key, value)]
        if None not in pair:
            return sum(n for n in pair if n is not None)
    for fused in FUSED:
        outputs = _outputs(getattr(module, fused, None))
        if outputs is not None:
            return 2 * outputs // 3
    return None


def _outputs(module: object) -> int | None:
    """Width of a projection: of `nn.Linear`, or of GPT-2's transposed one."""
    if isinstance(module, nn.Linear):
        return module.out_features
    width = getattr(module, "nf", None)
    return width if isinstance(width, int) else None


def _bytes(module: nn.Module) -> int:
    """Fast weights are float32, in a float64 model float64 (`memory.state.State`)."""
    wide = any(p.dtype == torch.float64 for p in module.parameters())
    return 8 if wide else 4
