"""Which parameters weight decay may touch: the rule of `nestling.optim.groups`, under the trainer's name for it."""

from __future__ import annotations

from nestling.optim.groups import decaying, parameter_groups

__all__ = ["decaying", "parameter_groups"]
