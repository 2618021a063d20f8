"""The SwiGLU feed-forward network (Shazeer 2020, arXiv:2002.05202), the channel mixer of Transformer++."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class FeedForwardConfig:
    """Settings of `FeedForward`.

    Attributes:
        hidden_size: width of the input and the output.
        intermediate_size: width of the gated hidden layer; 8/3 of `hidden_size` gives the parameters of a plain MLP
            of width 4.

    Raises:
        ValueError: a size below 1.
    """

    hidden_size: int
    intermediate_size: int

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


class FeedForward(nn.Module):
    """`y = W_down (silu(W_gate x) * W_up x)`, for every token by itself: no state, no mask."""

    def __init__(self, config: FeedForwardConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """Apply the network to the last dimension."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
