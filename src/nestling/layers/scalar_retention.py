"""What linear memories share: rates, masks, and the scan of those with one retention a token and head.

N rows, T time, H heads, D width.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nestling.ops.chunk_rule import chunk_scan
from nestling.ops.fla_kernels import fla_scan

Kernel = Literal["nestling", "fla"]
"""Whose code runs a memory: this package's (torch, and compiled C++ on CPUs), or flash-linear-attention's on a GPU."""

KERNELS: tuple[str, ...] = get_args(Kernel)

MIN_LOG_RETENTION = -30.0
"""Smallest log a_t. e^-30 of anything is nothing beside it in float32, and a cumulative sum with much larger
entries would lose the digits of the retentions around it."""

FIRST_STEPS = (1e-3, 0.1)
"""Range of softplus(dt_bias) at the start (Mamba-2's code)."""

FIRST_RATES = (1.0, 16.0)
"""Range of exp(A_log) at the start (Mamba-2's code)."""


def valid_tokens(lengths: Tensor | None, time: int, like: Tensor) -> Float[Tensor, "N 1 T"] | None:
    """1 where a row has a token and 0 in its padding; None when all rows have `time` tokens."""
    if lengths is None:
        return None
    slots = torch.arange(time, device="cpu")
    return (slots < lengths[:, None])[:, None].to(like.device, like.dtype)


def fixed_log_retention(num_heads: int, like: Tensor) -> Float[Tensor, "H 1"]:
    """log of gamma_h = 1 - 2^(-5 - h) (RetNet, Eq. 8), the same for every token."""
    head = torch.arange(num_heads, dtype=like.dtype, device=like.device)
    return torch.log1p(-torch.exp2(-5 - head))[:, None]


def data_log_retention(
    step: Float[Tensor, "N H T *channels"], a_log: Float[Tensor, " H"]
) -> Float[Tensor, "N H T *channels"]:
    """log a_t = -exp(A_log) step_t for steps >= 0 (Mamba-2; Gated DeltaNet section 3.4), not below -30."""
    rate = a_log.to(step.dtype).clamp_max(20.0).exp()
    return (-rate.reshape(-1, *[1] * (step.dim() - 2)) * step).clamp_min(MIN_LOG_RETENTION)


def scan_memory(
    k: Float[Tensor, "N H T K"],
    v: Float[Tensor, "N H T V"],
    q: Float[Tensor, "N H T K"],
    *,
    weight: Float[Tensor, "N H V K"],
    kernel: Kernel,
    chunk_size: int,
    log_retention: Float[Tensor, "N H T"] | None = None,
    inner_lr: Float[Tensor, "N H T"] | None = None,
    erase: bool = False,
    feedback: Float[Tensor, "H 1"] | None = None,
    precision: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "N H T V"], Float[Tensor, "N H V K"]]:
    """Outputs W_t q_t and the last fast weights of W_t = a_t W_{t-1} (I - l_t k_t k_t^T) + l_t v_t k_t^T.

    Without `erase` the bracket is I; with `feedback` b the first term is W_{t-1} (a_t - b l_t k_t k_t^T). Arguments and
    errors as in `ops.fla_kernels.fla_scan`, which runs if `kernel` is "fla" and has no feedback; else
    `ops.chunk_rule.chunk_scan` runs with `chunk_size`, in the dtype of its arguments.
    """
    if kernel == "fla":
        rates = {"log_retention": log_retention, "inner_lr": inner_lr}
        return fla_scan(k, v, q, weight=weight, erase=erase, precision=precision, **rates)
    taken = None
    if erase and inner_lr is not None and feedback is not None:
        taken = feedback * inner_lr
    elif erase and inner_lr is not None:
        # What is recalled comes from the retained weights.
        taken = inner_lr if log_retention is None else inner_lr * log_retention.exp()
    o, weight, _ = chunk_scan(
        k.contiguous(),
        -v.contiguous(),
        q.contiguous(),
        weight=weight,
        chunk_size=chunk_size,
        log_retention=log_retention,
        erase=taken,
        inner_lr=inner_lr,
    )
    return o, weight


@torch.no_grad()
def draw_retention(a_log: nn.Parameter, dt_bias: nn.Parameter) -> None:
    """A between 1 and 16, uniform; softplus(dt_bias) between 0.001 and 0.1, uniform in its logarithm."""
    a_log.copy_(torch.empty_like(a_log).uniform_(*FIRST_RATES).log())
    low, high = (math.log(s) for s in FIRST_STEPS)
    step = torch.empty_like(dt_bias).uniform_(low, high).exp()
    # The inverse of softplus.
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
