"""Which tokens of a forward pass a memory with a scope acts on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nestling.continual.store.records import LowRank
from nestling.continual.store.scope import Scope

ATTRIBUTE = "_nestling_read"
"""Where a cache of keys and values, or another state, holds the tokens that it was made of."""


class ScopeGate:
    """Watches the tokens that a model is given, and says of the present pass where the memory acts.

    What a cache was made of is kept on the cache itself, so that a pass that goes on from it decides as one that reads
    everything. Where that cannot be known (tokens given as embeddings, a cache made before, rows put together anew) the
    memory acts everywhere. Of beams that change places the tokens of the beam that was there before are taken.

    Args:
        scope: None acts everywhere.
        beside: the gates on one model, which this one joins while it is attached.

    Attributes:
        scope: likewise.
        open: `[rows, tokens]` of the present pass, on its device; None is everywhere.
        silent: nowhere in the present pass.
    """

    def __init__(self, scope: Scope | None = None, beside: list[ScopeGate] | None = None) -> None:
        self.scope, self.beside = scope, [] if beside is None else beside
        self.open: Bool[Tensor, "rows tokens"] | None = None
        self.silent = False
        self._read: tuple[Tensor, Tensor] | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module) -> None:
        """Watch this model, which every other hook of it must be called inside."""
        if not self._handles:
            # Partials, and no methods: a copy of the model then has a copy of the gate.
            self._handles = [
                model.register_forward_pre_hook(partial(_before, self), with_kwargs=True),
                model.register_forward_hook(partial(_after, self), with_kwargs=True, always_call=True),
            ]
            self.beside.append(self)

    def detach(self) -> None:
        """Watch it no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._clear()
        self.beside[:] = [gate for gate in self.beside if gate is not self]

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Open for a `with` block, whatever the scope."""
        scope, self.scope = self.scope, None
        try:
            yield
        finally:
            self.scope = scope

    def add(self, output: Tensor, difference: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A layer's output with what the memory says of its input, where it speaks.

        Raises:
            RuntimeError: a layer that is not given one vector for each token.
        """
        if self.silent:
            return output
        if self.open is None:
            return output + difference(x)
        if x.shape[:-1].numel() != self.open.numel():
            raise RuntimeError(
                f"a memory with a scope acts on single tokens, but of {self.open.numel()} a layer was given "
                f"{x.shape[:-1].numel()}; study with everywhere=True for such a model"
            )
        return output + difference(x) * self.open.reshape(*x.shape[:-1], 1).to(x.dtype)

    def _clear(self) -> None:
        self.open, self.silent, self._read = None, False, None

    def _see(self, ids: Int[Tensor, "rows tokens"], mask: Tensor | None, cache: object) -> None:
        """The tokens of a pass."""
        assert self.scope is not None
        found = _with_past(ids, mask, cache)
        if found is None:
            return
        self._read = ids_read, kept = found
        others = [gate.scope for gate in self.beside if gate is not self and gate.scope is not None]
        rows = zip(ids_read.tolist(), kept.tolist(), strict=True)
        new = torch.tensor([_speaking(self.scope, others, *row) for row in rows])[:, -ids.shape[1] :]
        self.silent = not bool(new.any())
        self.open = None if bool(new.all()) else new.to(ids.device)


class Scoped:
    """Differences of low rank beside the weights of linear layers, which act where a scope is open.

    Args:
        pairs: every layer with its difference.
        scope: where.
        beside: the gates on one model.
    """

    def __init__(
        self, pairs: Sequence[tuple[nn.Linear, LowRank]], scope: Scope, beside: list[ScopeGate] | None = None
    ) -> None:
        self.pairs, self.gate = pairs, ScopeGate(scope, beside)
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module) -> None:
        """Hooks on."""
        self.gate.attach(model)
        for layer, difference in self.pairs:
            factors = _Product(difference.left.to(layer.weight), difference.right.to(layer.weight))
            hook = partial(add_beside, self.gate, factors)
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.gate.detach()


@dataclass(frozen=True)
class _Product:
    left: Tensor
    right: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.right.T @ self.left.T


def add_beside(
    gate: ScopeGate,
    difference: Callable[[Tensor], Tensor],
    layer: nn.Module,
    arguments: tuple[Tensor, ...],
    keywords: Mapping[str, Tensor],
    output: Tensor,
) -> Tensor:
    """As a layer's forward hook, after its gate and what is added: see `ScopeGate.add`."""
    return gate.add(output, difference, arguments[0] if arguments else keywords["input"])


def _before(gate: ScopeGate, _: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    gate._clear()
    ids = keywords.get("input_ids", arguments[0] if arguments else None)
    if gate.scope is not None and isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
        gate._see(ids.detach(), keywords.get("attention_mask"), keywords.get("past_key_values"))


def _after(
    gate: ScopeGate, _: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: object
) -> None:
    cache = getattr(output, "past_key_values", None)
    if gate._read is not None and cache is not None and hasattr(cache, "__dict__"):
        object.__setattr__(cache, ATTRIBUTE, gate._read)
    gate._clear()


def _with_past(ids: Tensor, mask: Tensor | None, cache: object) -> tuple[Tensor, Tensor] | None:
    """All tokens up to the end of the pass and which of them count, on the CPU; None where they are not known."""
    ids = ids.cpu()
    counts = torch.ones_like(ids, dtype=torch.bool)
    length = _length(cache)
    if length:
        past = getattr(cache, ATTRIBUTE, None)
        if past is None or past[0].shape[1] < length or past[0].shape[0] not in (1, len(ids)):
            return None
        ids, counts = (
            torch.cat([old[:, :length].expand(len(new), -1), new], 1)
            for old, new in zip(past, (ids, counts), strict=True)
        )
    if mask is not None and mask.dim() == 2 and mask.shape == ids.shape:
        counts = mask.cpu().bool()
    return ids, counts


def _length(cache: object) -> int:
    """Tokens that a cache was made of."""
    if cache is None:
        return 0
    length = getattr(cache, "get_seq_length", None)
    if length is not None:
        return int(length())
    past = getattr(cache, ATTRIBUTE, None)
    return 1 if past is None else past[0].shape[1]


def _speaking(scope: Scope, others: Sequence[Scope], ids: list[int], counts: list[bool]) -> list[bool]:
    """At which tokens the memory speaks, among all; where some do not count, as at the one that counts before."""
    found = iter(scope.speaking([token for token, counted in zip(ids, counts, strict=True) if counted], others))
    speaks, all_of_them = False, []
    for counted in counts:
        speaks = next(found) if counted else speaks
        all_of_them.append(speaks)
    return all_of_them
