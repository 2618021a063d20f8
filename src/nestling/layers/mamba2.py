"""The Mamba-2 block (Mamba-2 section 7): a state-space model with one retention a head, as a matrix memory.

N rows, L row length, H heads, G groups of heads, S state size, P head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.layers.heads import draw_filters, fast_dtype, free_of_weight_decay, rms_norm
from nestling.layers.scalar_retention import (
    KERNELS,
    Kernel,
    data_log_retention,
    draw_retention,
    scan_memory,
    valid_tokens,
)
from nestling.layers.sequence import SequenceLayer
from nestling.memory.description import OBJECTIVES, MemoryDescription, write_rule
from nestling.memory.state import State
from nestling.ops.short_conv import short_conv


@dataclass(frozen=True)
class Mamba2Config:
    """Settings of `Mamba2`.

    Attributes:
        hidden_size: width of the layer's input and output.
        num_heads: H; a head has width `expand * hidden_size / num_heads`, 64 in the paper.
        state_size: S, width of the keys B and queries C; 128 in the paper.
        num_groups: G; the heads of a group share B and C, and the norm goes by groups. 1 in the paper.
        expand: inner width over `hidden_size`.
        conv_size: width of the causal convolution over x, B and C.
        chunk_size: tokens in a chunk. It changes speed and rounding, not the result.
        norm_eps: of the gated norm.
        kernel: whose code runs the memory, as in `LinearMemoryConfig`.

    Raises:
        ValueError: sizes that do not divide, or are not positive, or an unknown kernel.
    """

    hidden_size: int
    num_heads: int
    state_size: int = 128
    num_groups: int = 1
    expand: int = 2
    conv_size: int = 4
    chunk_size: int = 64
    norm_eps: float = 1e-6
    kernel: Kernel = "nestling"

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_heads", "state_size", "num_groups", "expand", "chunk_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.conv_size < 2:
            raise ValueError(f"conv_size must be at least 2, not {self.conv_size}: the block has a convolution")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, not {self.norm_eps}")
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel is one of {', '.join(map(repr, KERNELS))}, not {self.kernel!r}")
        if self.inner_size % self.num_heads:
            raise ValueError(
                f"the inner width {self.inner_size} (expand * hidden_size) is not a multiple of num_heads "
                f"{self.num_heads}"
            )
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_groups {self.num_groups} must divide num_heads {self.num_heads}")

    @property
    def inner_size(self) -> int:
        """H P."""
        return self.expand * self.hidden_size

    @property
    def head_dim(self) -> int:
        """P."""
        return self.inner_size // self.num_heads


@dataclass
class Mamba2State(State):
    """State of `Mamba2`.

    Attributes:
        weight: the fast weights, the state h of the paper.
        conv: the last `conv_size - 1` inputs of the convolution.
    """

    weight: Float[Tensor, "N H P S"]
    conv: Float[Tensor, "N past D"]


class Mamba2(SequenceLayer):
    """z, x, B, C and dt are one projection of the input; x, B and C go through a causal convolution and SiLU. Per head

        dt_t = softplus(dt + dt_bias),  a_t = exp(-exp(A_log) dt_t)
        W_t = a_t W_{t-1} + dt_t x_t B_t^T                           (Mamba-2, Eq. 1 with its scalar A)
        y = W_out RMSNorm((W_t C_t + D x_t) * silu(z_t))

    The middle line is the rule of `nestling.ops` with g = -x, keys B, queries C, l = dt and no erase.

    Examples:
        >>> import torch
        >>> from nestling.layers.mamba2 import Mamba2, Mamba2Config
        >>> layer = Mamba2(Mamba2Config(hidden_size=32, num_heads=2, state_size=16))
        >>> y, state = layer(torch.randn(1, 20, 32))
        >>> y.shape
        torch.Size([1, 20, 32])
    """

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        c = config
        shared = c.num_groups * c.state_size
        self.channels = c.inner_size + 2 * shared
        self.in_proj = nn.Linear(c.hidden_size, c.inner_size + self.channels + c.num_heads, bias=False)
        self.conv = nn.Parameter(torch.empty(self.channels, c.conv_size))
        self.conv_bias = nn.Parameter(torch.empty(self.channels))
        self.A_log = nn.Parameter(torch.empty(c.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.num_heads))
        self.D = nn.Parameter(torch.empty(c.num_heads))
        self.norm_weight = nn.Parameter(torch.ones(c.inner_size))
        self.out_proj = nn.Linear(c.inner_size, c.hidden_size, bias=False)
        free_of_weight_decay(self.conv, self.conv_bias, self.A_log, self.dt_bias, self.D, self.norm_weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The convolution near the identity, D = 1, and rates as in the paper's code."""
        draw_filters(self.conv)
        nn.init.zeros_(self.conv_bias)
        nn.init.ones_(self.D)
        draw_retention(self.A_log, self.dt_bias)

    def first_state(self, x: Tensor) -> Mamba2State:
        """An empty memory."""
        c, dtype = self.config, fast_dtype(x)
        return Mamba2State(
            weight=x.new_zeros(len(x), c.num_heads, c.head_dim, c.state_size, dtype=dtype),
            conv=x.new_zeros(len(x), c.conv_size - 1, self.channels, dtype=dtype),
        )

    def describe_memories(self) -> tuple[MemoryDescription, ...]:
        """The state-space model as a matrix memory with keys B, values x and queries C."""
        c = self.config
        return (
            MemoryDescription(
                name="memory",
                period=1,
                objective=OBJECTIVES["dot"],
                rule=write_rule(retention=True, erase=False),
                state=c.num_heads * c.head_dim * c.state_size,
            ),
        )

    def run(
        self, x: Float[Tensor, "N L hidden"], state: State, lengths: Tensor | None
    ) -> tuple[Float[Tensor, "N L hidden"], Mamba2State]:
        """See `SequenceLayer.run`."""
        if not isinstance(state, Mamba2State):
            raise TypeError(f"Mamba-2 continues from a Mamba2State, not from {type(state).__name__}")
        c = self.config
        z, xbc, dt = self.in_proj(x).split((c.inner_size, self.channels, c.num_heads), -1)
        xbc, tail = short_conv(xbc, self.conv, state.conv, lengths)
        with torch.autocast(x.device.type, enabled=False):
            dtype = state.weight.dtype
            values, keys, queries = self._tokens(F.silu(xbc.to(dtype) + self.conv_bias.to(dtype)))
            step = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype)).transpose(1, 2).contiguous()
            valid = valid_tokens(lengths, x.shape[1], step)
            # A token that is not there has dt = 0, which keeps everything and writes nothing.
            step = step if valid is None else step * valid
            o, weight = scan_memory(
                keys,
                values,
                queries,
                weight=state.weight,
                kernel=c.kernel,
                chunk_size=c.chunk_size,
                log_retention=data_log_retention(step, self.A_log),
                inner_lr=step,
                precision=z.dtype,
            )
            o = torch.addcmul(o, self.D.to(dtype)[:, None, None], values)
            o = self._gated_norm(o.transpose(1, 2).flatten(-2), z.to(dtype))
        return self.out_proj(o.to(z.dtype)), Mamba2State(weight, tail)

    def _tokens(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values `[N, H, L, P]`, keys B and queries C `[N, H, L, S]`, contiguous; a group's heads get the same."""
        c = self.config
        shared = c.num_groups * c.state_size
        x, keys, queries = xbc.split((c.inner_size, shared, shared), -1)
        x = x.unflatten(-1, (c.num_heads, c.head_dim)).transpose(1, 2).contiguous()
        repeats = c.num_heads // c.num_groups
        # Copied one by one: taken out of one copy, their gradients would be stacked and copied again.
        keys, queries = (
            t.unflatten(-1, (c.num_groups, 1, c.state_size))
            .permute(0, 2, 3, 1, 4)
            .expand(-1, -1, repeats, -1, -1)
            .flatten(1, 2)
            .contiguous()
            for t in (keys, queries)
        )
        return x, keys, queries

    def _gated_norm(self, o: Float[Tensor, "N L inner"], z: Tensor) -> Float[Tensor, "N L inner"]:
        """RMSNorm of every group, after the gate."""
        groups = (self.config.num_groups, -1)
        o = (o * F.silu(z)).unflatten(-1, groups)
        return rms_norm(o, self.norm_weight.unflatten(-1, groups), self.config.norm_eps).flatten(-2)
