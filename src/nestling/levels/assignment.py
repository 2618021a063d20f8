"""Which parameters belong to which level of an optimizer, said in one line: `cms.0=1,cms.1=8,cms.2=64`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import nn
from torch.optim import Optimizer

from nestling.errors import UserError
from nestling.layers.continuum import ContinuumMemory
from nestling.layers.feed_forward import LeveledFeedForward
from nestling.optim import MultiFrequency, OptimizerLevel

MOST_DIGITS = 19  # of a period: what 64 bits hold

REST = "rest"
"""Name of the level of all parameters that no pattern names; its period is 1."""
SHOWN = 16
"""Names in a message at most."""


def parse_levels(text: str, unit: str = "steps") -> dict[str, int]:
    """`"cms.1=8,cms.2=64"` as `{"cms.1": 8, "cms.2": 64}`, in the given order.

    Args:
        text: as on the command line.
        unit: what a period counts, for the error messages.

    Raises:
        UserError: an entry that is no NAME=PERIOD, a period that is no whole number from 1, or a name given twice.
    """
    levels: dict[str, int] = {}
    for entry in text.split(","):
        name, equals, period = (part.strip() for part in entry.partition("="))
        if not name or not equals:
            raise UserError(
                f"--levels: {entry.strip()!r} is no NAME=PERIOD; write for example --levels NAME=8,OTHER=64, NAME a "
                "level of the model or a pattern of parameter names"
            )
        if not (period.isascii() and period.isdigit() and len(period) < MOST_DIGITS) or int(period) < 1:
            raise UserError(f"--levels: the period of {name} is a number of {unit}, 1 or more, not {period[:40]!r}")
        if name in levels:
            raise UserError(f"--levels: {name} is given twice")
        levels[name] = int(period)
    return levels


def continuum_levels(model: nn.Module) -> dict[str, set[str]]:
    """Names of the parameters of level N of all continuum memories of a model, by `cms.N`."""
    found: dict[str, set[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, ContinuumMemory):
            for index, level in enumerate(module.levels):
                prefix = f"{path}.levels.{index}" if path else f"levels.{index}"
                found.setdefault(f"cms.{index}", set()).update(f"{prefix}.{n}" for n, _ in level.named_parameters())
    return found


def stream_levels(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters of every level that a model's configuration gives a period, fastest first.

    These are the levels of a model made by `models.convert`, the down, up and gate projections of its
    `LeveledFeedForward` networks; a model without such levels has none. Parameters without a gradient count too.
    """
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LeveledFeedForward):
            for level, part in module.levels.items():
                prefix = f"{path}.levels.{level}" if path else f"levels.{level}"
                found.setdefault(level, []).extend(f"{prefix}.{n}" for n, _ in part.named_parameters())
    periods = getattr(getattr(model, "config", None), "levels", None)
    return {level: found[level] for level in periods or found if level in found}


def named_levels(model: nn.Module) -> dict[str, set[str]]:
    """Names of the parameters of all levels that a model itself names: `continuum_levels` and `stream_levels`."""
    return continuum_levels(model) | {level: set(names) for level, names in stream_levels(model).items()}


def steps_of(periods: Mapping[str, int], tokens: int) -> dict[str, int]:
    """Periods in optimizer steps for periods in tokens, to the nearest whole step (a half to the even one).

    Args:
        periods: in tokens, by level.
        tokens: of an optimizer step.

    Raises:
        UserError: a period shorter than a step, or two that come to the same number of steps.
    """
    steps = {level: round(period / tokens) for level, period in periods.items()}
    fastest = min(periods.values())
    ratios = ",".join(f"{level}={max(1, round(period / fastest))}" for level, period in periods.items())
    advice = f"make the step smaller (--batch-size, --sequence-length), or give periods in steps: --levels {ratios}"
    for level, period in periods.items():
        if period < tokens:
            raise UserError(
                f"level {level} is updated every {period:,} tokens, and an optimizer step has {tokens:,}; {advice}"
            )
    for (fast, a), (slow, b) in pairwise(steps.items()):
        if a == b:
            raise UserError(f"the levels {fast} and {slow} would both be updated every {a:,} steps; {advice}")
    return steps


def assign_levels(model: nn.Module, levels: Mapping[str, int]) -> dict[str, list[str]]:
    """Names of the trainable parameters of every level.

    A level's name is one that the model itself names (`cms.N`, for level N of every block's continuum memory, or that
    of a converted model's level), or a pattern of parameter names, where `*`
    stands for any text (`blocks.*.mixer.*`, `embed_tokens.weight`). The first name that fits a parameter takes it;
    what none fits is the level `REST`, where anything is left.

    Raises:
        UserError: a name that fits nothing, or nothing that an earlier name has not taken; the message says what
            exists.
    """
    own = named_levels(model)
    left = {name: p for name, p in model.named_parameters() if p.requires_grad}
    everything, assigned = list(left), {}
    for pattern in levels:
        named = own.get(pattern)
        fits = [n for n in everything if (n in named if named is not None else fnmatchcase(n, pattern))]
        if not fits:
            raise UserError(f"--levels: {pattern} fits no parameter of this model; it has {existing_names(model)}")
        assigned[pattern] = [n for n in fits if n in left]
        if not assigned[pattern]:
            raise UserError(f"--levels: every parameter of {pattern} belongs to a level named before it; name it first")
        for name in assigned[pattern]:
            del left[name]
    return assigned | ({REST: list(left)} if left else {})


def multi_frequency(
    model: nn.Module,
    levels: Mapping[str, int],
    optimizer: Callable[..., Optimizer],
    rate_exponent: float = 0.0,
) -> MultiFrequency:
    """A `MultiFrequency` over the levels of `assign_levels`.

    Args:
        model: whose trainable parameters are optimized.
        levels: periods in steps, by name.
        optimizer: `optimizer(only=parameters)` makes a level's inner optimizer, as `optim.build` does.
        rate_exponent: as in `MultiFrequency`.

    Raises:
        UserError: as `assign_levels`.
    """
    parameters = dict(model.named_parameters())
    made = {
        level: OptimizerLevel([parameters[n] for n in names], levels.get(level, 1))
        for level, names in assign_levels(model, levels).items()
    }
    return MultiFrequency(made, optimizer=lambda only: optimizer(only=only), rate_exponent=rate_exponent)


def describe_levels(model: nn.Module, levels: Mapping[str, int]) -> str:
    """One line: every level with its parameters and its period."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    parts = []
    for level, names in assign_levels(model, levels).items():
        period = levels.get(level, 1)
        every = "every step" if period == 1 else f"every {period:,} steps"
        parts.append(f"{level}: {sum(sizes[n] for n in names):,} parameters {every}")
    return "; ".join(parts)


def existing_names(model: nn.Module) -> str:
    """What a level may name, for a message: the model's own levels, and its parameters, those of all blocks as one."""
    names = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name, _ in model.named_parameters()))
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")
    levels = named_levels(model)
    own = f"the levels {', '.join(levels)} and " if levels else ""
    return f"{own}the parameters {shown}"
