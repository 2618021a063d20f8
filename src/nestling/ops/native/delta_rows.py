"""The compiled delta rule on the rows of a momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops.native.build import call


def native_delta_rows_(m: Tensor, key: Tensor, value: Tensor, kept: float, delta: float, scale: str) -> None:
    """m_r <- kept m_r - e_r (m_r . k_r) k_r + v_r for every row of `[rows, width]`, in place; all contiguous."""
    rows, width = m.shape
    numbers = {"rows": rows, "width": width, "threads": torch.get_num_threads(), "scale": scale}
    tensors = {"m": m, "keys": key, "values": value}
    call("delta_rows", m.dtype, False, {**numbers, "kept": kept, "delta": delta, **tensors})
