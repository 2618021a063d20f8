from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is loaded, which the package would load: its module alone.
_spec = importlib.util.spec_from_file_location("threads", Path(__file__).parents[1] / "src/nestling/threads.py")
assert _spec is not None and _spec.loader is not None
_threads = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_threads)
_threads.wait_briefly()

import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

from tests.shapes import check_shapes, switch  # noqa: E402

check_shapes()


def pytest_collection_finish() -> None:
    """What is imported and collected stays to the end; a full collection that looks through it takes half a second."""
    gc.collect()
    gc.freeze()


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
