"""Which parameters weight decay may touch."""

from __future__ import annotations

from typing import Any

from torch import nn


def decaying(model: nn.Module) -> list[str]:
    """Names of matrices and stacks of them; gains, biases, rates and what a layer marks `_no_weight_decay` stay."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and not getattr(parameter, "_no_weight_decay", False)
    ]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: what decays, and what does not."""
    names = set(decaying(model))
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if n in names], "weight_decay": weight_decay},
        {"params": [p for n, p in named if n not in names], "weight_decay": 0.0},
    ]
