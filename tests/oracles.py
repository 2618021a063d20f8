"""Implementations that nobody here wrote, to compare with."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch


def fla_naive(operation: str) -> ModuleType:
    """The naive PyTorch reference of one operation of flash-linear-attention (distribution fla-core).

    Its file is loaded by itself: importing the package would import its GPU kernels, and these need triton. The test is
    skipped where the distribution is not installed; `make setup` installs it.
    """
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        pytest.skip("fla-core is not installed (make setup)")
    found = [Path(folder) / "ops" / operation / "naive.py" for folder in package.submodule_search_locations]
    path = next((p for p in found if p.is_file()), None)
    if path is None:
        pytest.skip(f"this release of fla-core has no naive reference of {operation}")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{operation}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def float32_is_float64() -> Iterator[None]:
    """Code that casts to float32 casts to float64 in here, so that a comparison is not limited by rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield
