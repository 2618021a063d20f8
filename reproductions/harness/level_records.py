"""Do the levels of an experiment learn different things? Records around an optimizer's steps, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nestling.levels.measures import LevelMeter, roles_by_depth
from nestling.optim import MultiFrequency

COMPARED_BLOCKS = 2
"""Of each level; a pair costs about 8 width^2 hidden operations in float64 for each of its three matrices."""
Record = dict[str, float]


def record_levels(
    model: nn.Module, levels: Mapping[str, Sequence[str]], optimizer: MultiFrequency, every: int
) -> list[Record]:
    """A list to which every `every`-th step of the optimizer will add `{"step": ..., MEASURE: ...}`, the first among
    them.

    Args:
        model: with its first weights.
        levels: names of every level's parameters, those of groups of blocks.
        optimizer: of these levels.
        every: steps.
    """
    meter = LevelMeter(model, levels, roles_by_depth(levels, COMPARED_BLOCKS))
    records: list[Record] = []

    def before(_: Optimizer, arguments: object, keywords: object) -> None:
        meter.before_step(optimizer, meter.steps % every == 0)

    def after(_: Optimizer, arguments: object, keywords: object) -> None:
        meter.after_step()
        if (meter.steps - 1) % every == 0:
            records.append({"step": float(meter.steps), **meter.measure()})

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return records


def levels_alike(records: Sequence[Record]) -> Record:
    """The mean over all records of every measure between two levels (`LEVEL~LEVEL/...`), the cosine left out: it means
    nothing between different blocks."""
    keys = sorted({key for record in records for key in record if "~" in key and not key.endswith("/cosine")})
    return {key: sum(r[key] for r in records if key in r) / sum(key in r for r in records) for key in keys}


def levels_tables(rows: Mapping[str, Sequence[Record]]) -> list[str]:
    """Lines of two Markdown tables: how alike the gradients of each two levels are, and how far each level moved.

    Args:
        rows: records by method.
    """
    alike = ["| method | levels | gradients' subspaces alike | by chance |", "| --- | --- | --- | --- |"]
    moved = [
        "| method | level | distance from the base, relative | latest update's norm |",
        "| --- | --- | --- | --- |",
    ]
    for method, records in rows.items():
        means = levels_alike(records)
        for key in (k for k in means if k.endswith("/subspace")):
            pair = key.removesuffix("/subspace").replace("~", ", ")
            alike.append(f"| `{method}` | {pair} | {means[key]:.3f} | {means[key + '_chance']:.3f} |")
        last: dict[str, Any] = records[-1] if records else {}
        for key in (k for k in last if k.endswith("/relative_distance")):
            level = key.removesuffix("/relative_distance")
            update = last.get(f"{level}/update_norm")
            told = "none yet" if update is None else f"{update:.4f}"
            moved.append(f"| `{method}` | {level} | {last[key]:.5f} | {told} |")
    if len(alike) == 2 and len(moved) == 2:
        return ["Levels: not measured (`--measures N`)."]
    return [*alike, "", *moved]
