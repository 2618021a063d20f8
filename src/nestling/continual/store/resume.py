"""A learner as a `Memory` and back, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling.continual.component import named, own
from nestling.continual.learner.observation import Counters
from nestling.continual.store.adapters import Adapter, put_together
from nestling.continual.store.applying import MemoryUseError
from nestling.continual.store.memory import Memory
from nestling.continual.stream.chunks import Piece, decode
from nestling.optim.noise_scale import KEYS, check_values

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner

VALUES = (int, float, bool, str, type(None))


def to_memory(learner: Learner) -> Memory:
    """Everything of a learner, copied to the CPU; of its running mean what it has learned alone."""
    tensors, optimizer = _optimizer_state(learner)
    differences: dict[str, Any] = {}
    for weights in learner.weights.values():
        differences |= weights.differences()
        tensors |= {f"exact.{name}": value for name, value in weights.exact().items()}
    adapters: dict[str, Any] = {}
    if learner.scope is not None:
        differences, adapters = put_together([*learner.earlier.adapters, Adapter(learner.scope, differences)])
    stream, log = learner.stream, learner.log
    tensors["history"] = stream.history.clone()
    tensors |= {f"pieces.{i}": piece.encode() for i, piece in enumerate(stream.pieces)}
    kept: dict[str, Any] = {}
    for name, component in learner.components.items():
        tensors |= named(name, component.tensors())
        kept |= {} if (values := component.values()) is None else {name: values}
    if learner.shows_average:
        tensors = {}
    return Memory(
        fingerprint=learner.fingerprint,
        periods={name: level.period for name, level in learner.settings.levels.items()},
        parameters={name: list(level.parameters) for name, level in learner.settings.levels.items()},
        differences=differences,
        documents=list(log.records),
        settings={
            "learner": learner.settings.values(),
            "counters": dict(vars(learner.counters)),
            "guard": {"mean": learner.guard.mean, "spikes": learner.guard.spikes},
            "document": {"present": log.present, "total": log.total, "targets": log.targets},
            "stream": {"open": stream.open, "starts": [piece.start for piece in stream.pieces]},
            "optimizer": optimizer,
            "studies": list(learner.studies),
        }
        | adapters
        | kept,
        tensors=tensors,
    )


def load(learner: Learner, memory: Memory) -> None:
    """Give a learner the state of a memory; see `Learner.load`."""
    check_model(memory, learner.fingerprint)
    _check_levels(learner, memory)
    *earlier, newest = memory.adapters or (None,)
    scope, differences = (None, memory.differences) if newest is None else (newest.scope, newest.differences)
    exact = {name.removeprefix("exact."): t for name, t in memory.tensors.items() if name.startswith("exact.")}
    try:
        for weights in learner.weights.values():
            weights.check(differences, exact)
        taking = [
            component.prepare(own(name, memory.tensors), memory.settings.get(name) if memory.tensors else None)
            for name, component in learner.components.items()
        ]
        learner.check_scope(scope)
        _check_adapters(learner, memory)
        if memory.tensors:
            _load_progress(learner, memory)
        else:
            learner.start_afresh()
            learner.counters.adopted = 1
            taking = [component.replaced for component in learner.components.values()]
        for weights in learner.weights.values():
            weights.load(differences, exact)
        for take in taking:
            take()
        learner.earlier.replace(earlier)
        learner.set_scope(scope)
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"the memory does not fit together: {type(error).__name__}, {error}") from error
    learner.log.records = list(memory.documents)


def check_model(memory: Memory, fingerprint: str) -> None:
    """Raises ValueError for a memory of another base model than that of `fingerprint`."""
    if memory.fingerprint != fingerprint:
        raise ValueError(
            f"the memory belongs to the base model {memory.fingerprint}, this one is {fingerprint}; load it on the "
            "model it was learned on"
        )


def _check_adapters(learner: Learner, memory: Memory) -> None:
    own = {name for level in learner.settings.levels.values() for name in level.parameters}
    for each in memory.adapters:
        if strange := sorted(each.differences.keys() - own):
            raise ValueError(f"the memory's adapters change {strange[0]}, which is of no level")


def _check_levels(learner: Learner, memory: Memory) -> None:
    levels = learner.settings.levels
    if memory.periods != {name: level.period for name, level in levels.items()}:
        raise ValueError(
            f"the memory's levels and periods are {memory.periods}, the learner's "
            f"{ {name: level.period for name, level in levels.items()} }"
        )
    for name, level in levels.items():
        if list(memory.parameters[name]) != list(level.parameters):
            raise ValueError(f"level {name!r} of the memory has other parameters than the learner's")


def _load_progress(learner: Learner, memory: Memory) -> None:
    """All but the weights. What can fail is read before anything is set."""
    settings, tensors = memory.settings, memory.tensors
    starts: list[int] = settings["stream"]["starts"]
    pieces: list[Piece] = [decode(tensors[f"pieces.{i}"], start) for i, start in enumerate(starts)]
    opened = bool(settings["stream"]["open"])
    count = sum(name.startswith("pieces.") for name in tensors)
    if len(pieces) != count or (opened and not count) or any(not 0 <= p.start < len(p.ids) for p in pieces):
        raise ValueError("the memory's pending tokens and their places do not fit together")
    if sum(len(piece) for piece in pieces) >= learner.stream.chunk:
        raise ValueError(f"the memory's pending tokens do not fit a chunk of {learner.stream.chunk}")
    if any(len(p.ids) and not 0 <= int(p.ids.min()) <= int(p.ids.max()) < learner.vocabulary for p in pieces):
        raise ValueError(f"the memory's pending tokens are not in the vocabulary of {learner.vocabulary}")
    history = tensors["history"]
    if (
        history.dtype != torch.int64
        or history.dim() != 1
        or bool(((history < 0) | (history >= learner.vocabulary)).any())
    ):
        raise ValueError(f"the memory's last tokens are no tokens of the vocabulary of {learner.vocabulary}")
    counters, guard, document = settings["counters"], settings["guard"], settings["document"]
    tokens, skipped, chunks = (int(counters[name]) for name in ("tokens", "skipped", "chunks"))
    # Memories of version 0.2 do not count these.
    consolidations, adopted = (int(counters.get(name, -1)) for name in ("consolidations", "adopted"))
    mean, spikes = None if guard["mean"] is None else float(guard["mean"]), int(guard["spikes"])
    studies = studies_of(settings)
    present, total, targets = bool(document["present"]), float(document["total"]), int(document["targets"])
    _load_optimizer(learner, _with_state(learner, settings["optimizer"], tensors))
    learner.stream.pieces, learner.stream.history = pieces, history.clone()
    learner.stream.open = opened
    learner.counters = Counters(tokens, skipped, chunks, consolidations, adopted)
    learner.guard.mean, learner.guard.spikes = mean, spikes
    learner.studies = studies
    learner.log.present, learner.log.total, learner.log.targets = present, total, targets


def studies_of(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a memory's settings say of its studies, checked: which texts, after how many documents, how, how long.

    Raises:
        ValueError: that is no study.
    """
    values = settings.get("studies", [])
    if not isinstance(values, list):
        raise ValueError(f"a memory's studies are a list, in this one {str(values)[:80]}")
    for each in values:
        fields = each if isinstance(each, dict) else {}
        whole = [isinstance(fields.get(name), int) and fields[name] >= 0 for name in ("records", "added", "steps")]
        digests, how = fields.get("digests"), fields.get("settings")
        named = isinstance(digests, list) and all(isinstance(digest, str) for digest in digests)
        if not all(whole) or not named or not isinstance(how, dict) or not isinstance(fields.get("finished"), bool):
            raise ValueError(f"a study of this memory is none: {str(each)[:80]}")
    return [dict(each) for each in values]


def _load_optimizer(learner: Learner, state: dict[str, Any]) -> None:
    """Take a state whole, or keep the own one."""
    try:
        learner.optimizer.load_state_dict(state)
    except ValueError as error:
        raise MemoryUseError(
            f"the memory's optimizer state does not fit its parameters: {error}. What the memory has learned is whole: "
            "export it, fork the export, and learn from that with a fresh optimizer"
        ) from error


def _optimizer_state(learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by `optimizer.INDEX.NAME`, and the rest as JSON values; groups keep what changes in them."""
    packed = learner.optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in packed["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value.detach().cpu().clone()
            elif isinstance(value, VALUES) and isinstance(index, int):
                numbers.setdefault(str(index), {})[name] = value
            else:
                raise ValueError(f"the optimizer's state {name!r} is {type(value).__name__}, which no memory can hold")
    groups = [
        {"lr": float(g["lr"]), "level_elapsed": g["level_elapsed"]} | {key: g[key] for key in KEYS if key in g}
        for g in packed["param_groups"]
    ]
    return tensors, {"groups": groups, "numbers": numbers}


def _with_state(learner: Learner, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `state_dict` that `_optimizer_state` took apart."""
    packed = learner.optimizer.state_dict()
    if len(saved["groups"]) != len(packed["param_groups"]):
        raise ValueError(
            "the memory's optimizer has other parameter groups than the learner's; give the same optimizer"
        )
    count = sum(len(group["params"]) for group in packed["param_groups"])
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value.clone()
    for index, values in saved["numbers"].items():
        state.setdefault(int(index), {}).update(values)
    if any(not 0 <= index < count for index in state):
        raise ValueError("the memory's optimizer has more parameters than the learner's")
    for group, new in zip(packed["param_groups"], saved["groups"], strict=True):
        _check_group(group, new)
    groups = [group | new for group, new in zip(packed["param_groups"], saved["groups"], strict=True)]
    return {"state": state, "param_groups": groups}


def _check_group(own: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """What a memory keeps of a parameter group: its rate, the chunks since its level's last update, and of an adaptive
    level what it has measured."""
    period, adaptive = own["level_period"], set(KEYS) & set(own)
    if set(group) != {"lr", "level_elapsed", *adaptive}:
        raise ValueError(f"a parameter group of the memory's optimizer has {', '.join(sorted(group))}")
    lr, elapsed = group["lr"], group["level_elapsed"]
    if not isinstance(lr, float) or not 0 <= lr < math.inf:
        raise ValueError(f"a rate of the memory's optimizer is {str(lr)[:80]}, and not a number, 0 or more")
    if not isinstance(elapsed, int) or not 0 <= elapsed < period:
        raise ValueError(
            f"a level's chunks since its update are 0 to {period - 1} by its period, in the memory {str(elapsed)[:80]}"
        )
    if adaptive:
        check_values(group)
