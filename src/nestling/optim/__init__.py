"""Optimizers as memories of gradients (NL sections 4 and 7)."""

from __future__ import annotations

from nestling.optim.multi_frequency import MultiFrequency, OptimizerLevel

__all__ = ["MultiFrequency", "OptimizerLevel"]
