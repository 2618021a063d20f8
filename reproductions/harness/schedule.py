"""The learning rate of the small trainings."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import OneCycleLR

WARMUP = 0.1
"""Share of the steps."""


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int) -> OneCycleLR:
    """Warm-up from a twenty-fifth of a group's rate, at least one step, then a cosine to a tenth of the rate."""
    steps = max(steps, 3)
    # A warm-up or a cosine without a step of its own would divide by zero.
    return OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        steps,
        pct_start=max(WARMUP, 2 / steps),
        div_factor=25,
        final_div_factor=0.4,
        cycle_momentum=False,
    )
