"""The levels of a learner: which parameters, how often, how fast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nestling.continual.component import LearnerComponent
from nestling.continual.learner.options import Level, Options, Settings
from nestling.continual.learner.steps import retain
from nestling.continual.learner.weights import FullWeights, LevelWeights, LowRankWeights
from nestling.continual.store.scope_gate import ScopeGate
from nestling.levels.assignment import existing_names, named_levels, stream_levels
from nestling.optim import MultiFrequency, OptimizerLevel, build
from nestling.optim.layer_inputs import InputOptimizer

MLPS = ("*.mlp.*", "*.channel.*")
"""Patterns of MLPs: of transformers' models, and of this library's."""

DEFAULT_PERIOD = 256
"""Tokens: half of the default context, so that a chunk is read in one piece."""


def resolve(model: nn.Module, levels: Mapping[str, Level | int] | None) -> dict[str, Level]:
    """The levels with every parameter by its exact name, fastest first.

    A parameter that several levels' patterns fit belongs to the first of them.

    Args:
        model: whose parameters.
        levels: by name. A number is a period: of the model's own level of that name, or of the parameters that fit the
            name as a pattern. None is `default_levels`.

    Raises:
        ValueError: no levels or something else than a mapping, a pattern that fits nothing, a level that is neither,
            weights that cannot be learned, or periods that are no multiples of the fastest.
    """
    if levels is None:
        levels = default_levels(model)
    if not isinstance(levels, Mapping):
        raise ValueError(f'levels are given by name, as {{"fast": Level(256, ("*.mlp.*",))}}, not {levels!r}')
    if not levels:
        raise ValueError('no levels are given: name some, as {"fast": Level(256, ("*.mlp.*",))}, or leave them out')
    own = named_levels(model)
    parameters = dict(model.named_parameters())
    everything = left = list(parameters)
    found: dict[str, Level] = {}
    for name, level in levels.items():
        if isinstance(level, int):
            level = Level(level, tuple(own.get(name, (name,))))
        if not isinstance(level, Level):
            raise ValueError(f"level {name!r} is a Level or a period in tokens, not {level!r}")
        fits = [n for n in everything if any(n == p or fnmatchcase(n, p) for p in level.parameters)]
        patterns = ", ".join(level.parameters[:3])
        if not fits:
            raise ValueError(f"level {name!r}: {patterns} fits no parameter; the model has {existing_names(model)}")
        taken = [n for n in left if n in set(fits)]
        if not taken:
            raise ValueError(f"level {name!r}: an earlier level has taken every parameter of {patterns}; name it first")
        for parameter in taken:
            _check_weight(parameter, parameters[parameter])
        found[name] = replace(level, parameters=tuple(taken))
        left = [n for n in left if n not in set(taken)]
    fastest = min(level.period for level in found.values())
    for name, level in found.items():
        if level.period % fastest:
            raise ValueError(
                f"the period of level {name!r}, {level.period} tokens, is no multiple of the fastest, {fastest}"
            )
    return dict(sorted(found.items(), key=lambda item: item[1].period))


def default_levels(model: nn.Module) -> dict[str, Level]:
    """What learns where nobody says otherwise: the model's own levels (`nestling.models.convert`) at their periods; of
    a model without any, all MLPs as one level, every `DEFAULT_PERIOD` tokens."""
    if own := stream_levels(model):
        periods = cast(Any, model).config.levels
        return {name: Level(periods[name], tuple(names)) for name, names in own.items()}
    names = [name for name, _ in model.named_parameters()]
    mlps = next((pattern for pattern in MLPS if any(fnmatchcase(n, pattern) for n in names)), MLPS[0])
    return {mlps: Level(DEFAULT_PERIOD, (mlps,))}


def make_weights(model: nn.Module, settings: Settings, gate: ScopeGate) -> dict[str, LevelWeights]:
    """What every level learns, attached to the model; of low rank, added where the gate is open."""
    made: dict[str, LevelWeights] = {}
    for index, (name, level) in enumerate(settings.levels.items()):
        rank = level.rank or settings.options.rank
        names = list(level.parameters)
        made[name] = (
            FullWeights(model, names)
            if rank is None
            else LowRankWeights(model, names, rank, settings.options.seed + index, gate)
        )
    return made


def make_optimizer(
    settings: Settings, weights: Mapping[str, LevelWeights], reads_apart: Sequence[str]
) -> MultiFrequency:
    """One inner optimizer a level, periods in chunks, gradients averaged over the period.

    The mean and not Eq. 71's sum: Adam's step does not depend on the gradient's scale, and the step of SGD and of the
    memories that follow a gradient's size would otherwise grow with the period on top of `rate_exponent`. So a level's
    rate means the same for every period and every optimizer.

    Args:
        settings: of the learner.
        weights: of its levels.
        reads_apart: options with which something is read beside a chunk in passes of its own.

    Raises:
        ValueError: passes beside the chunk's, with an optimizer that learns from layer inputs.
    """
    fastest, chunk = min(level.period for level in settings.levels.values()), settings.chunk
    made = MultiFrequency(
        {
            name: OptimizerLevel(
                weights[name].learned,
                level.period // chunk,
                _factory(settings, level, weights[name], fastest),
                level.signal_to_noise or settings.options.signal_to_noise,
            )
            for name, level in settings.levels.items()
        },
        reduce="mean",
    )
    watching = {level.name: level.optimizer for level in made.levels if isinstance(level.optimizer, InputOptimizer)}
    if watching and reads_apart:
        for optimizer in watching.values():
            optimizer.close()
        raise ValueError(
            f"the optimizer of level {next(iter(watching))!r} learns from the layers' inputs, which have no weight: it "
            f"takes nothing that is read beside a chunk in passes of its own, as {' and '.join(reads_apart)} here "
            "(replay without projection or teacher is not)"
        )
    return made


def step_levels(
    optimizer: MultiFrequency,
    weights: Mapping[str, LevelWeights],
    components: Iterable[LearnerComponent],
    options: Options,
) -> list[str]:
    """Update the levels whose period has passed; their names."""
    due = optimizer.due()
    for component in components:
        component.before_step(due)
    for name in due:
        if (kept := options.retention_of(name)) != 1:
            retain(weights[name].anchored, kept)
    optimizer.step()
    for component in components:
        component.after_step(due)
    return due


def _check_weight(name: str, weight: Tensor) -> None:
    """Raises ValueError for values that steps are lost in, or that cannot be stepped."""
    kind = str(weight.dtype).removeprefix("torch.")
    if not weight.is_floating_point():
        raise ValueError(f"{name} is {kind}, a quantized weight, which cannot be learned; load the model in float32")
    if torch.finfo(weight.dtype).bits < 32:
        raise ValueError(
            f"{name} is {kind}, in which small steps are lost: load the model with dtype=torch.float32; "
            "Options(bfloat16=True) runs the forward pass in bfloat16 all the same"
        )


def rate(settings: Settings, level: Level, fastest: int) -> float:
    """The level's own rate, or lr * (period / fastest)^rate_exponent."""
    return settings.lr * (level.period / fastest) ** settings.rate_exponent if level.lr is None else level.lr


def _factory(settings: Settings, level: Level, weights: LevelWeights, fastest: int) -> Any:
    chosen = level.optimizer or settings.optimizer
    if not isinstance(chosen, str):
        return chosen
    lr = rate(settings, level, fastest)
    return partial(_build, chosen, weights.owner, lr=lr, betas=settings.options.betas)


def _build(name: str, owner: nn.Module, only: list[Any], *, lr: float, betas: tuple[float, float]) -> Optimizer:
    return build(name, owner, lr=lr, betas=betas, only=only)
