"""Rotary positions: rows that stand at the same place, at different ones, and no rows."""

from __future__ import annotations

import pytest
import torch

from nestling.ops.rotary import rotate, rotation

CPU = torch.device("cpu")


@pytest.mark.parametrize("start", [None, [0], [3], [3, 3], [3, 0, 7]])
def test_angles(start: list[int] | None) -> None:
    """Channel pair i turns by theta^(-2 i / width) a token; rows are kept apart where they differ."""
    places = None if start is None else torch.tensor(start)
    cos, sin = rotation(6, 100.0, places, 4, CPU)
    rows = sorted(set(start or [0])) if len(set(start or [0])) == 1 else list(start or [])
    assert cos.shape == sin.shape == (len(rows), 4, 1, 3)
    for row, first in enumerate(rows):
        for t in range(4):
            for i in range(3):
                angle = torch.tensor((first + t) * 100.0 ** (-2 * i / 6), dtype=torch.float64)
                torch.testing.assert_close(cos[row, t, 0, i], angle.cos())
                torch.testing.assert_close(sin[row, t, 0, i], angle.sin())


def test_no_rows() -> None:
    cos, sin = rotation(6, 100.0, torch.zeros(0, dtype=torch.int64), 4, CPU)
    assert cos.shape == sin.shape == (0, 4, 1, 3)
    assert rotate(torch.ones(0, 4, 2, 6), cos, sin).shape == (0, 4, 2, 6)
