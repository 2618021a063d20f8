"""Which parameters belong to which level of an optimizer, said in one line: `cms.0=1,cms.1=8,cms.2=64`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.optim import Optimizer

from nestling.errors import UserError
from nestling.layers.continuum import ContinuumMemory
from nestling.optim import MultiFrequency, OptimizerLevel

REST = "rest"
"""Name of the level of all parameters that no pattern names; its period is 1."""


def parse_levels(text: str) -> dict[str, int]:
    """`"cms.1=8,cms.2=64"` as `{"cms.1": 8, "cms.2": 64}`, in the given order.

    Raises:
        UserError: an entry that is no NAME=PERIOD, a period that is no whole number from 1, or a name given twice.
    """
    levels: dict[str, int] = {}
    for entry in text.split(","):
        name, equals, period = (part.strip() for part in entry.partition("="))
        if not name or not equals:
            raise UserError(
                f"--levels: {entry.strip()!r} is no NAME=PERIOD; write for example --levels cms.1=8,cms.2=64"
            )
        if not (period.isascii() and period.isdigit()) or int(period) < 1:
            raise UserError(f"--levels: the period of {name} is a number of steps, 1 or more, not {period!r}")
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


def assign_levels(model: nn.Module, levels: Mapping[str, int]) -> dict[str, list[str]]:
    """Names of the trainable parameters of every level.

    A level's name is `cms.N`, for level N of every block's continuum memory, or a pattern of parameter names, where `*`
    stands for any text (`blocks.*.mixer.*`, `embed_tokens.weight`). The first name that fits a parameter takes it;
    what none fits is the level `REST`, where anything is left.

    Raises:
        UserError: a name that fits nothing, or nothing that an earlier name has not taken; the message says what
            exists.
    """
    continuum = continuum_levels(model)
    left = {name: p for name, p in model.named_parameters() if p.requires_grad}
    everything, assigned = list(left), {}
    for pattern in levels:
        named = continuum.get(pattern)
        fits = [n for n in everything if (n in named if named is not None else fnmatchcase(n, pattern))]
        if not fits:
            raise UserError(
                f"--levels: {pattern} fits no parameter of this model; it has {_existing(model, continuum)}"
            )
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


def _existing(model: nn.Module, continuum: Mapping[str, set[str]]) -> str:
    """What a level may name, short enough for one line."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
    own = f"the levels {', '.join(continuum)} and " if continuum else ""
    return f"{own}the parameters {shown}"
