"""Which model a memory belongs to."""

from __future__ import annotations

from torch import nn

from nestling.models.fingerprint import fingerprint


def base_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of a model's class, its parameters' names and shapes, and a sample of their values.

    Take it before anything is learned: a learned weight changes it.
    """
    return fingerprint(model, type(model).__name__)
