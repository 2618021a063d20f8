"""What a layer says about its own memories, for instruments that look at a model from outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from nestling.memory.rule import Rule


@dataclass(frozen=True, kw_only=True)
class MemoryDescription:
    """One memory of a layer, in the terms of NL Definitions 1 and 2.

    Attributes:
        name: within the layer.
        period: tokens between two updates of what is read; None for a non-parametric solution, which is found anew for
            every query (update frequency infinity, NL section 8).
        objective: what the memory minimises.
        rule: how.
        state: numbers it holds for one row.
        growth: further numbers with every token.
        initial: names, within the layer, of the parameters that are its first state; empty if that is zeros.
        feeds: names of the layer's memories whose state at a token needs this one's at the same token.
        generates: names of the layer's memories whose keys, values, rates or targets it makes.
        part: the submodule that holds it, where that is not the whole module.
        restarts: name of the layer's memory that sets its state anew at the end of a context (NL Eq. 72).
    """

    name: str
    period: int | None
    objective: str
    rule: str
    state: int
    growth: int = 0
    initial: tuple[str, ...] = ()
    feeds: tuple[str, ...] = ()
    generates: tuple[str, ...] = ()
    part: str = ""
    restarts: str | None = None


@runtime_checkable
class DescribesMemories(Protocol):
    """A module with memories of its own (those of its submodules speak for themselves)."""

    def describe_memories(self) -> tuple[MemoryDescription, ...]:
        """The memories, from the settings and tensors of the module."""
        ...


OBJECTIVES = {"l2": "½|M(k) − v|²", "dot": "−⟨M(k), v⟩", "lp": "|M(k) − v|ₚᵖ / p", "huber": "Huber(M(k) − v)"}


def write_rule(
    *, retention: bool, erase: bool, momentum: bool = False, rate: str = "l", by_channel: bool = False
) -> str:
    """The rule of section `ops` in one line, with the terms that are there.

    Args:
        retention: a_t below 1.
        erase: the delta projection.
        momentum: the write comes from a surprise S.
        rate: of the write; "" for 1.
        by_channel: a_t has a number for every channel of the key.
    """
    kept = ("W" if not retention else "W diag(a)" if by_channel else "a W") + (" − e W k kᵀ" if erase else "")
    step = " ".join(part for part in (rate, "g kᵀ") if part)
    return f"W ← {kept} + S" if momentum else f"W ← {kept} − {step}"


def describe_rule(rule: Rule, retention: bool, chunk_size: int) -> tuple[str, str]:
    """Objective and rule of a memory that learns by `Rule`, with where its gradients are taken."""
    online = rule.gradient == "online"
    text = write_rule(retention=retention, erase=rule.erase or online, momentum=rule.momentum)
    taken = "online" if online else f"g at the start of {chunk_size} tokens"
    return OBJECTIVES[rule.objective], f"{text}; {taken}"


SURPRISE = ("⟨S, g kᵀ⟩", "S ← b S − l g kᵀ")
"""Objective and rule of a memory's momentum (Titans Eq. 10; NL Eq. 13 on the gradients of the inner objective)."""
