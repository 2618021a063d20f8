"""A stand-in for flash-linear-attention's kernels on any device, made of its own naive references.

It takes what the kernels take, `[B, T, H, D]` and a state `[B, H, K, V]`, and refuses what they refuse.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from nestling.ops import fla_kernels
from tests.oracles import fla_naive

KERNELS = {"simple_gla": "chunk_simple_gla", "gated_delta_rule": "chunk_gated_delta_rule"}
"""The function that is used from each package of `fla.ops`."""


class FakeKernels:
    """The two kernels; `calls` lists the name and the operands' dtype of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, torch.dtype]] = []
        # Before the package's place is taken.
        self.naive = {name: fla_naive(name) for name in KERNELS}

    def chunk_simple_gla(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        self._check("simple_gla", q, k, v, initial_state)
        g = torch.zeros_like(q[..., 0]) if g is None else g
        return self.naive["simple_gla"].naive_recurrent_simple_gla(q, k, v, g, scale, initial_state, output_final_state)

    def chunk_gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        self._check("gated_delta_rule", q, k, v, initial_state)
        run = self.naive["gated_delta_rule"].naive_recurrent_gated_delta_rule
        y, last = run(q, k, v, beta, g, scale, initial_state, output_final_state)
        return y.to(v.dtype), last

    def _check(self, name: str, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> None:
        assert q.dtype == k.dtype == v.dtype
        assert q.shape == k.shape
        assert q.shape[:3] == v.shape[:3]
        if q.dtype == torch.bfloat16:
            assert q.shape[-1] % 2 == v.shape[-1] % 2 == 0, "16-bit operands need even widths"
        if state is not None:
            assert state.shape == (len(q), q.shape[2], q.shape[3], v.shape[3])
            assert state.dtype == torch.float32
        self.calls.append((name, q.dtype))


def error_ratio(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of `wanted`."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-12)).item()


@contextmanager
def skip_refused_triton() -> Iterator[None]:
    """Skip the test where the backward pass is refused on this GPU with this Triton."""
    try:
        yield
    except RuntimeError as error:
        if "upgrade Triton" not in str(error):
            raise
        pytest.skip(f"outputs agree; for gradients: {error}")


@contextmanager
def fake_fla() -> Iterator[FakeKernels]:
    """`fla.ops` is a `FakeKernels` in here, and `kernel="fla"` runs on the CPU."""
    fake = FakeKernels()
    modules = {"fla": ModuleType("fla"), "fla.ops": ModuleType("fla.ops")}
    modules |= {f"fla.ops.{name}": SimpleNamespace(**{f: getattr(fake, f)}) for name, f in KERNELS.items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(fla_kernels, "DEVICE", "cpu")
        yield fake
