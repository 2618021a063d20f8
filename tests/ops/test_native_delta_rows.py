"""The compiled delta rule on rows against torch's operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nestling.ops import native
from nestling.optim.delta_momentum import write_rows_


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", ["nlms", "bounded", "literal"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (300, 129), (0, 4), (4, 0)])
def test_compiled_rows_are_torchs(
    shape: tuple[int, int], scale: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.fits(torch.zeros(1, 1)):
        pytest.skip("no compiler")
    generator = torch.Generator().manual_seed(0)
    first, key, other = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    key[1:2] = 0.0
    key[2:3] *= 1e-3
    for value in (key, other):
        compiled, plain = first.clone(), first.clone()
        calls = []
        original = native.native_delta_rows_
        with monkeypatch.context() as patch:
            patch.setattr(native, "native_delta_rows_", lambda *a, of=original, seen=calls: seen.append(of(*a)))
            write_rows_(compiled, key, value, 0.9, 0.7, scale)
            assert len(calls) == 1
            patch.setattr(native, "fits", lambda *_: False)
            write_rows_(plain, key, value, 0.9, 0.7, scale)
            assert len(calls) == 1
        close = 1e-12 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(compiled, plain, rtol=close, atol=close)


def test_rows_with_gaps_take_torchs_way() -> None:
    wide = torch.randn(4, 10, dtype=torch.float64)
    m, key = wide[:, ::2].clone(), torch.randn(4, 5, dtype=torch.float64)
    write_rows_(m, key, key, 0.9, 1.0, "nlms")
    view = wide[:, ::2]
    write_rows_(view, key, key, 0.9, 1.0, "nlms")
    torch.testing.assert_close(view, m)
