"""Implementations that nobody here wrote, loaded for comparison."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def fla_naive(operation: str) -> ModuleType | None:
    """The naive PyTorch reference of one operation of flash-linear-attention (distribution fla-core), or None.

    Its file is loaded by itself: importing the package would import its GPU kernels, and these need triton.
    """
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        return None
    found = [Path(folder) / "ops" / operation / "naive.py" for folder in package.submodule_search_locations]
    path = next((p for p in found if p.is_file()), None)
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location(f"fla_naive_{operation}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
