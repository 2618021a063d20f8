"""Putting what was learned into a model, and taking it out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestling.continual.store.adapters import Adapter
from nestling.continual.store.fingerprint import base_fingerprint
from nestling.continual.store.records import LowRank, dense, identity, shape_of
from nestling.continual.store.scope_gate import Scoped, ScopeGate
from nestling.errors import UserError

# On the module itself, so that a deep copy of a model knows what it holds.
ATTRIBUTE = "_nestling_memory"
LEARNER = "_nestling_learner"
"""Where a model holds the learner that is attached to it: one that is forgotten must not leave its weights unseen."""

COPIED = "a copy of a model with a learner"
"""What a copy of such a model holds in the learner's place."""


class MemoryUseError(UserError, ValueError):
    """A memory that cannot be put into this model, or taken out of it."""


@dataclass
class Applied:
    """What a model remembers of the memory it holds, or held.

    Attributes:
        owner: `identity` of the differences held; None when it has been taken out to rounding.
        base: fingerprint of the model before.
        originals: the parameters' values before; None where they were not kept.
        rounded: fingerprint after a removal that was exact to rounding only.
        beside: adapters, which the parameters do not hold; none where they do.
    """

    owner: str | None
    base: str
    originals: dict[str, Tensor] | None = None
    rounded: str | None = None
    beside: tuple[Scoped, ...] = ()


def put_in(
    model: nn.Module,
    fingerprint: str,
    differences: Mapping[str, Tensor | LowRank],
    *,
    keep_originals: bool,
    adapters: Sequence[Adapter] = (),
) -> None:
    """Add every difference to its parameter, or adapters beside it; all is checked before anything changes.

    Raises:
        MemoryUseError: another base model, a memory already inside, a parameter the model lacks or shapes otherwise.
    """
    if (attached := getattr(model, LEARNER, None)) is not None:
        what = f"this is {COPIED}" if attached == COPIED else "a learner is attached to the model"
        raise MemoryUseError(f"{what}; call the learner's detach() first" + ", then copy" * (attached == COPIED))
    if (reason := _in_the_way(model)) is not None:
        raise MemoryUseError(reason)
    owner, record = identity(differences), held_by(model)
    if record is not None and record.owner is not None:
        again = "this memory" if record.owner == owner else "another memory"
        raise MemoryUseError(
            f"{again} is already applied to the model; remove it first (two memories become one with merge)"
        )
    _check_base(model, fingerprint, record)
    targets = _targets(model, differences)
    if adapters:
        gates: list[ScopeGate] = []
        beside = tuple(Scoped(layers_of(model, each), each.scope, gates) for each in adapters)
        for each in beside:
            each.attach(model)
        setattr(model, ATTRIBUTE, Applied(owner, fingerprint, beside=beside))
        return
    originals = {name: p.detach().clone() for name, p in targets.items()} if keep_originals else None
    _add(targets, differences, 1.0)
    setattr(model, ATTRIBUTE, Applied(owner, fingerprint, originals))


def take_out(model: nn.Module, differences: Mapping[str, Tensor | LowRank]) -> None:
    """Undo `put_in`: bit for bit where the originals were kept, else by subtraction, exact to rounding.

    Raises:
        MemoryUseError: this memory is not applied to the model.
    """
    record = held_by(model)
    if record is None or record.owner is None:
        raise MemoryUseError("no memory is applied to the model, so none can be removed")
    if record.owner != identity(differences):
        raise MemoryUseError("another memory is applied to the model; remove that one")
    if record.beside:
        for each in record.beside:
            each.detach()
        delattr(model, ATTRIBUTE)
        return
    targets = _targets(model, differences)
    if record.originals is None:
        _add(targets, differences, -1.0)
        setattr(model, ATTRIBUTE, Applied(None, record.base, rounded=base_fingerprint(model)))
        return
    with torch.no_grad():
        for name, parameter in targets.items():
            parameter.copy_(record.originals[name])
    delattr(model, ATTRIBUTE)


@contextmanager
def put_in_for_a_while(
    model: nn.Module,
    fingerprint: str,
    differences: Mapping[str, Tensor | LowRank],
    adapters: Sequence[Adapter] = (),
) -> Iterator[None]:
    """`put_in`, and `take_out` bit for bit however the block ends."""
    put_in(model, fingerprint, differences, keep_originals=True, adapters=adapters)
    try:
        yield
    finally:
        take_out(model, differences)


def held_by(model: nn.Module) -> Applied | None:
    """What a model knows of the memory inside it; None where there never was one, or it was removed bit for bit."""
    record = getattr(model, ATTRIBUTE, None)
    return record if isinstance(record, Applied) else None


def check_free(model: nn.Module, learner: object) -> None:
    """Raises ValueError for a model that another learner than this one, or a memory, is on, and for a wrapped one."""
    if (reason := _in_the_way(model)) is not None:
        raise ValueError(reason)
    attached = getattr(model, LEARNER, learner)
    if attached == COPIED:
        raise ValueError(
            f"this is {COPIED} attached, so its weights are no base weights but what that learner had learned; copy "
            "the model while the learner is detached: learner.detach(), copy.deepcopy(model), learner.apply()"
        )
    if attached is not learner:
        raise ValueError("another learner is attached to this model; call its detach() first")
    if (held := held_by(model)) is not None and held.owner is not None:
        raise ValueError("a memory is applied to this model; remove it first, and load it into the learner")


def _in_the_way(model: nn.Module) -> str | None:
    """Why neither a memory nor a learner can be put on this model, whatever it holds."""
    for wrapped in ("module", "_orig_mod"):  # by DistributedDataParallel, by torch.compile
        if isinstance(getattr(model, wrapped, None), nn.Module) and not hasattr(type(model), "from_pretrained"):
            return f"a {type(model).__name__} stands around the model; give the model itself, its .{wrapped}"
    for name, p in model.named_parameters():
        if p.is_meta:
            return f"{name} is offloaded, so its values are not at hand; load the model without offloading"
        if p.is_inference():
            return f"{name} was made under torch.inference_mode and cannot be changed; load the model outside it"
    return None


def _check_base(model: nn.Module, fingerprint: str, record: Applied | None) -> None:
    found = base_fingerprint(model)
    if found == fingerprint:
        return
    if record is not None and record.base == fingerprint and record.rounded == found:
        return  # the base model, but for the rounding of an earlier removal
    raise MemoryUseError(
        f"the memory belongs to another model (fingerprint {fingerprint}, this model is {found}); load the model it "
        "was learned on, in the same precision, and change none of its weights before"
    )


def _targets(model: nn.Module, differences: Mapping[str, Tensor | LowRank]) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets = {}
    for name, difference in differences.items():
        if name not in parameters:
            raise MemoryUseError(f"the memory changes {name}, which a {type(model).__name__} does not have")
        if tuple(parameters[name].shape) != shape_of(difference):
            raise MemoryUseError(
                f"the memory's {name} has shape {shape_of(difference)}, the model's {tuple(parameters[name].shape)}"
            )
        targets[name] = parameters[name]
    if len({id(p) for p in targets.values()}) != len(targets):
        raise MemoryUseError("the memory changes one parameter under two names (tied weights)")
    return targets


def layers_of(model: nn.Module, adapter: Adapter) -> list[tuple[nn.Linear, LowRank]]:
    """The layers that an adapter stands beside, each with its difference.

    Raises:
        MemoryUseError: a difference that is of no linear layer's weight.
    """
    layers = {f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if missing := [name for name in adapter.differences if name not in layers]:
        raise MemoryUseError(f"the memory speaks within a scope, and {missing[0]} is no linear layer's weight")
    return [(layers[name], difference) for name, difference in adapter.differences.items()]


@torch.no_grad()
def _add(targets: Mapping[str, nn.Parameter], differences: Mapping[str, Tensor | LowRank], sign: float) -> None:
    """In float32 at least, so that a half-precision model is rounded once."""
    for name, parameter in targets.items():
        exact = torch.promote_types(parameter.dtype, torch.float32)
        change = dense(differences[name]).to(parameter.device, exact)
        parameter.copy_(parameter.to(exact) + sign * change)
