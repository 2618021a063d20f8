"""Implementations that nobody here wrote, to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from benchmarks import public


def fla_naive(operation: str) -> ModuleType:
    """`benchmarks.public.fla_naive`; the test is skipped where there is none (`make setup` installs it)."""
    module = public.fla_naive(operation)
    if module is None:
        pytest.skip(f"fla-core is not installed, or has no naive reference of {operation} (make setup)")
    return module


@contextmanager
def float32_is_float64() -> Iterator[None]:
    """Code that casts to float32 casts to float64 in here, so that a comparison is not limited by rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield
