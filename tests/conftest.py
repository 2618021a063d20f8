from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded; `nestling.threads` says why

import torch
from transformers.utils import logging

from tests.shapes import check_shapes, switch

check_shapes()


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    """Small tensors gain nothing from threads, and xdist runs one process a core."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves the default dtype alone."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def _shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shapes are checked, but where a test gives wrong ones to see what a user would."""
    switch["on"] = request.node.get_closest_marker("any_shapes") is None
    yield
    switch["on"] = True
