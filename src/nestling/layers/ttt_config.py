"""Settings of test-time training layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TTTConfig:
    """Settings of `TTTLayer`.

    Attributes:
        hidden_size: width of the layer's input and output.
        num_heads: H; every head has an inner model of width `hidden_size / num_heads`, which must be even (rotary
            positions turn pairs of channels).
        inner: the inner model's f_res, "linear" (TTT-Linear) or "mlp" (TTT-MLP: one hidden layer with GELU).
        expansion: hidden width of the MLP over its head width; 4 in the paper.
        chunk_size: tokens of an inner mini-batch, b in the paper; 16 is its choice.
        inner_lr: base of the inner learning rate, eta_base; None is the paper's 1 for "linear" and 0.1 for "mlp".
        step: "sum" steps down the sum of a mini-batch's gradients, W_t = W_0 - sum_s eta_s G_s (section 2.4).
            "mean" is what the authors' code does: W_t = W_0 - c_i sum_s eta_s G_s, with a learnable c_i that starts as
            1 / i for the i-th token of a mini-batch.
        conv_size: width of the causal convolutions that make q and k from one shared projection (the paper's Mamba
            backbone, its default: 4). 1 is none, and q and k have projections of their own (the Transformer backbone).
        output_gate: multiply the normalised output by gelu(x W_g) (the Mamba backbone).
        rope_theta: base of the rotary frequencies; positions count within a mini-batch.
        norm_eps: of the inner model's LayerNorm and the output's.

    Raises:
        ValueError: sizes that do not divide or are not positive, or an unknown name.
    """

    hidden_size: int
    num_heads: int
    inner: Literal["linear", "mlp"] = "linear"
    expansion: int = 4
    chunk_size: int = 16
    inner_lr: float | None = None
    step: Literal["sum", "mean"] = "sum"
    conv_size: int = 4
    output_gate: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "expansion", "chunk_size", "conv_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of num_heads {self.num_heads}: "
                "rotary positions turn pairs of channels of a head"
            )
        if self.inner not in ("linear", "mlp"):
            raise ValueError(f"inner is 'linear' or 'mlp', not {self.inner!r}")
        if self.step not in ("sum", "mean"):
            raise ValueError(f"step is 'sum' or 'mean', not {self.step!r}")
        if self.inner_lr is not None and self.inner_lr < 0:
            raise ValueError(f"inner_lr must not be negative, not {self.inner_lr}; None takes the paper's")
        for name in ("rope_theta", "norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    @property
    def head_dim(self) -> int:
        """D, the width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def base_lr(self) -> float:
        """eta_base."""
        if self.inner_lr is not None:
            return self.inner_lr
        return 1.0 if self.inner == "linear" else 0.1
