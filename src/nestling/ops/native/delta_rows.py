"""The compiled delta rule on the rows of a momentum."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nestling.ops.native.build import kernel, pointers, sizes

SCALES = ("nlms", "bounded", "literal")


def native_delta_rows_(m: Tensor, key: Tensor, value: Tensor, kept: float, delta: float, scale: str) -> None:
    """m_r <- kept m_r - e_r (m_r . k_r) k_r + v_r for every row of `[rows, width]`, in place; all contiguous."""
    numbers = sizes(*m.shape, SCALES.index(scale), torch.get_num_threads())
    constants = (ctypes.c_double * 2)(kept, delta)
    kernel().nestling_delta_rows(numbers, constants, pointers((m, key, value)), int(m.dtype == torch.float64))
