"""What memories spend their time on as compiled C++ for the CPU, built on first use with the system's compiler.

`python -m nestling.ops.native` builds it ahead of time. Plain C++ behind ctypes rather than a torch extension: without
torch's headers it compiles in seconds, and no other build tool is needed. Where no compiler works, or with the
environment variable NESTLING_NATIVE=0, everything runs through torch, with the same results to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops.native.arguments import elsewhere
from nestling.ops.native.build import library
from nestling.ops.native.chunk import native_chunk
from nestling.ops.native.delta_rows import native_delta_rows_
from nestling.ops.native.diagonal import native_diagonal
from nestling.ops.native.loop import SCALES, TOKENS, LoopShape, LoopTensors, native_loop
from nestling.ops.native.memories import MAX_LAYERS, BankShape, native_inner, native_read
from nestling.ops.native.normalize import native_normalize
from nestling.ops.native.rates import RateRule, native_rates
from nestling.ops.native.scan import native_scan
from nestling.ops.native.short_conv import native_short_conv

__all__ = [
    "MAX_CHUNK",
    "MAX_LAYERS",
    "SCALES",
    "SCAN_CHUNK",
    "TOKENS",
    "BankShape",
    "LoopShape",
    "LoopTensors",
    "RateRule",
    "fits",
    "native_chunk",
    "native_delta_rows_",
    "native_diagonal",
    "native_inner",
    "native_loop",
    "native_normalize",
    "native_rates",
    "native_read",
    "native_scan",
    "native_short_conv",
]

# Above these a problem outgrows a core's cache, and torch's own products are the faster ones.
MAX_CHUNK = 512
_MAX_WIDTH = 512
# Of a scan, whose result is the same for every chunk.
SCAN_CHUNK = 128


def fits(x: Tensor, weight: Tensor | None = None) -> bool:
    """Whether compiled code can take `x` `[..., C, K]` and `weight` `[..., out, in]`: on the CPU, of cache size.

    Its products are in float32, so those of float32 tensors are left to PyTorch where it was asked for bfloat16
    (`torch.set_float32_matmul_precision("medium")`).

    Raises:
        ValueError: x is on the CPU, and the weight is elsewhere (it was offloaded, or the layer was not moved whole).
    """
    if weight is not None and _plain(x) and weight.device.type != "cpu":
        raise ValueError(elsewhere("a memory's weight", weight))
    return (
        _plain(x)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and (weight is None or (_plain(weight) and x.dtype == weight.dtype and _small(x, weight)))
        and (weight is None or x.dtype == torch.float64 or torch.get_float32_matmul_precision() != "medium")
        and library() is not None
    )


def _plain(t: Tensor) -> bool:
    """Subclasses (fake, distributed, functorch's) have no memory of their own to point at."""
    on_cpu = t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64)
    return on_cpu and type(t) in (Tensor, torch.nn.Parameter)


def _small(x: Tensor, weight: Tensor) -> bool:
    return x.shape[-2] <= MAX_CHUNK and max(weight.shape[-2:]) <= _MAX_WIDTH
