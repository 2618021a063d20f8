"""The Triton kernels of flash-linear-attention for the linear family on CUDA GPUs, under this package's shapes.

Its distribution is fla-core, the extra `fla` of this package; written against version 0.6. Nothing of it is imported
before `fla_scan` is first called.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from packaging.version import Version
from torch import Tensor
from torch.nn import functional as F

DEVICE = "cuda"
"""Type of the devices the kernels run on; torch calls AMD's GPUs so too."""

HOPPER = 9
"""Major compute capability of Hopper GPUs."""

MISCOMPILED = (Version("3.4.0"), Version("3.7.1"))
"""Releases of Triton, the first included and the last not, that compile the backward kernels wrongly for Hopper."""

MAX_DELTA_KEYS = 256
"""Widest keys of the delta rule's kernel."""


class Kernels(NamedTuple):
    """The functions of flash-linear-attention that are used."""

    simple_gla: Callable[..., tuple[Tensor, Tensor]]
    gated_delta_rule: Callable[..., tuple[Tensor, Tensor]]


def fla_scan(
    k: Float[Tensor, "N H T K"],
    v: Float[Tensor, "N H T V"],
    q: Float[Tensor, "N H T K"],
    *,
    weight: Float[Tensor, "N H V K"],
    log_retention: Float[Tensor, "N H T"] | None = None,
    inner_lr: Float[Tensor, "N H T"] | None = None,
    erase: bool = False,
    precision: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "N H T V"], Float[Tensor, "N H V K"]]:
    """A linear memory over a whole sequence, by the kernel that has its terms:

        W_t = a_t W_{t-1} + l_t v_t k_t^T                          chunk_simple_gla
        W_t = a_t W_{t-1} (I - l_t k_t k_t^T) + l_t v_t k_t^T      chunk_gated_delta_rule

    and y_t = W_t q_t; gradients flow to every tensor argument. Tokens with l_t = 0 and a_t = 1 change nothing, so rows
    of different lengths need no boundaries. Queries are not scaled, and l_t may exceed 1. The kernels choose their
    own chunk size (64). The delta rule without retention runs as the gated one with log a_t = 0, not by
    `chunk_delta_rule`: that takes no float32, and gave wrong numbers on a Hopper GPU with Triton 3.6.

    Precision: the state and the rates stay in float32, products accumulate in float32. Keys, values, queries and the
    outputs are bfloat16 if the model computes in bfloat16, else float32 with products in TF32.

    Args:
        k: keys; with `erase`, of length 1 at most.
        v: values, before their multiplication by l.
        q: queries.
        weight: the fast weights before the first token, float32.
        log_retention: log a_t <= 0; None is a_t = 1.
        inner_lr: l_t; None is 1, which `erase` does not allow.
        erase: take away what the memory recalls at the key before the value is written.
        precision: what the layer around the memory computes in.

    Returns:
        The outputs and the fast weights after the last token, in the dtype of `weight`.

    Raises:
        ValueError: tensors on another device than a CUDA GPU, fast weights in float64, `erase` without `inner_lr` or
            with keys wider than 256.
        ImportError: flash-linear-attention or Triton is not installed.
        RuntimeError: gradients are wanted on a Hopper GPU with Triton 3.4 to 3.7.0, which compiles the backward pass
            wrongly. They refuse it themselves where there is retention; without it one gradient was wrong too.
    """
    _check(weight, erase, inner_lr)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (k, v, q, weight, inner_lr)):
        _check_triton(weight.device)
    kernels = _kernels()
    dtype = torch.bfloat16 if precision == torch.bfloat16 else torch.float32
    if inner_lr is not None and not erase:
        v = inner_lr[..., None] * v
    if inner_lr is not None and erase and log_retention is None:
        log_retention = torch.zeros_like(inner_lr)
    values, keys = weight.shape[-2:]
    k, v, q = (_even(t).transpose(1, 2).to(dtype) for t in (k, v, q))
    first = _even(_even(weight).mT)
    a, beta = (None if rate is None else rate.transpose(1, 2) for rate in (log_retention, inner_lr))
    if erase:
        y, last = kernels.gated_delta_rule(
            q, k, v, g=a, beta=beta, scale=1.0, initial_state=first, output_final_state=True
        )
    else:
        y, last = kernels.simple_gla(q, k, v, g=a, scale=1.0, initial_state=first, output_final_state=True)
    y = y[..., :values].transpose(1, 2).to(weight.dtype)
    return y, last[..., :keys, :values].mT.contiguous()


def _check(weight: Tensor, erase: bool, inner_lr: Tensor | None) -> None:
    if weight.device.type != DEVICE:
        raise ValueError(
            f"kernel='fla' runs on CUDA GPUs and the memory is on {weight.device}: move the model there with "
            "model.to('cuda'), or set kernel='nestling' in its config"
        )
    if weight.dtype != torch.float32:
        raise ValueError(
            f"kernel='fla' keeps its state in float32, not {weight.dtype}: convert the model, or set kernel='nestling'"
        )
    if erase and inner_lr is None:
        raise ValueError("erase=True needs inner_lr, the strength at which it erases and writes")
    if erase and weight.shape[-1] > MAX_DELTA_KEYS:
        raise ValueError(
            f"kernel='fla' with erase=True takes keys of at most {MAX_DELTA_KEYS} channels, not {weight.shape[-1]}: "
            "use more heads or a smaller key_dim, or set kernel='nestling'"
        )


def _check_triton(device: torch.device) -> None:
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return
    found = importlib.metadata.version("triton")
    if MISCOMPILED[0] <= Version(found) < MISCOMPILED[1]:
        raise RuntimeError(
            f"kernel='fla' has wrong gradients on this GPU with Triton {found}: upgrade Triton to {MISCOMPILED[1]} or "
            "later, or set kernel='nestling' in the model's config"
        )


def _even(t: Tensor) -> Tensor:
    """A last channel of zeros where the number is odd: their backward pass refuses odd widths in 16 bits."""
    return F.pad(t, (0, 1)) if t.shape[-1] % 2 else t


def _kernels() -> Kernels:
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise ImportError(
            f"kernel='fla' needs flash-linear-attention and Triton ({error}): pip install 'nestling[fla]', or set "
            "kernel='nestling' in the model's config"
        ) from error
    return Kernels(chunk_simple_gla, chunk_gated_delta_rule)
