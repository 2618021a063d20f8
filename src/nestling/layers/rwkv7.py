"""RWKV-7's time mixing (Peng et al. 2025, arXiv:2503.14456): a matrix memory that erases along a key of its own.

N rows, L row length, H heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nestling.layers.heads import fast_dtype, free_of_weight_decay, group_norm, split_heads
from nestling.layers.scalar_retention import valid_tokens
from nestling.layers.sequence import SequenceLayer
from nestling.memory.description import OBJECTIVES, MemoryDescription
from nestling.memory.state import State
from nestling.ops.diagonal_rule import diagonal_scan
from nestling.ops.normalize import safe_normalize
from nestling.ops.short_conv import short_conv

MOST_FORGOTTEN = math.exp(-0.5)
"""-log of the smallest retention: w_t = exp(-e^(-1/2) sigmoid(.)) lies between 0.545 and 1."""

FIRST_MIX = (0.1, 0.45, 0.35, 0.35, 0.45, 0.1)
"""Exponents p of the first token shifts 1 - (channel / width)^p of r, w, k, v, a, g: the authors' half way up."""


@dataclass(frozen=True)
class RWKV7Config:
    """Settings of `RWKV7`.

    Attributes:
        hidden_size: width of the layer's input and output, and of all keys, values and queries together.
        num_heads: H.
        decay_rank: rank of the projections that give the retention and the in-context learning rate; None is
            2.5 sqrt(hidden_size) by the head width over 64, in steps of 32 and at least that (the authors' code).
        gate_rank: rank of the output gate; None is 5 sqrt(hidden_size), likewise.
        chunk_size: tokens in a chunk. It changes speed and rounding, not the result.
        norm_eps: of the GroupNorm, per channel of a head: 1e-5 times K enters, as the authors have it.

    Raises:
        ValueError: sizes that do not divide, or are not positive.
    """

    hidden_size: int
    num_heads: int
    decay_rank: int | None = None
    gate_rank: int | None = None
    chunk_size: int = 64
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "decay_rank", "gate_rank", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, not {self.norm_eps}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")

    @property
    def head_dim(self) -> int:
        """K."""
        return self.hidden_size // self.num_heads

    @property
    def ranks(self) -> tuple[int, int]:
        """Of retention and in-context learning rate, and of the output gate."""
        root = self.hidden_size**0.5
        decay = _rank(2.5 * root * self.head_dim / 64) if self.decay_rank is None else self.decay_rank
        return decay, _rank(5 * root) if self.gate_rank is None else self.gate_rank


@dataclass
class RWKV7State(State):
    """State of `RWKV7`.

    Attributes:
        weight: the fast weights, V by K.
        tail: the last input, which the next token is mixed with.
    """

    weight: Float[Tensor, "N H K K"]
    tail: Float[Tensor, "N 1 hidden"]


class RWKV7(SequenceLayer):
    """Six mixes of the token and the one before it, x + mu (x_{t-1} - x) with a mu by channel, give r, k, v, by channel
    a retention w and an in-context learning rate a, and the output gate g. Per head

        kappa_t = (k_t * xi) / |k_t * xi|,    k~_t = k_t * (1 + (a_t - 1) * alpha)
        W_t = W_{t-1} (diag(w_t) - kappa_t (a_t * kappa_t)^T) + v_t k~_t^T
        y_t = W_out (g_t * (GroupNorm(W_t r_t) + (r_t . (rho * k~_t)) v_t))

    with learned xi, alpha, rho: the rule of `ops.diagonal_rule` that asks at kappa and erases along a * kappa.

    Examples:
        >>> import torch
        >>> from nestling.layers.rwkv7 import RWKV7, RWKV7Config
        >>> layer = RWKV7(RWKV7Config(hidden_size=32, num_heads=2))
        >>> y, state = layer(torch.randn(1, 20, 32))
        >>> state.weight.shape
        torch.Size([1, 2, 16, 16])
    """

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.config = config
        width, heads, (decay, gate) = config.hidden_size, config.num_heads, config.ranks
        self.mix = nn.Parameter(torch.empty(6, width))
        self.r_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.decay_down = nn.Linear(width, decay, bias=False)
        self.decay_up = nn.Linear(decay, width, bias=False)
        self.decay_bias = nn.Parameter(torch.empty(width))
        self.rate_down = nn.Linear(width, decay, bias=False)
        self.rate_up = nn.Linear(decay, width, bias=False)
        self.rate_bias = nn.Parameter(torch.empty(width))
        self.gate_down = nn.Linear(width, gate, bias=False)
        self.gate_up = nn.Linear(gate, width, bias=False)
        self.erase_scale = nn.Parameter(torch.empty(width))
        self.write_share = nn.Parameter(torch.empty(width))
        self.bonus = nn.Parameter(torch.empty(heads, config.head_dim))
        self.norm_weight = nn.Parameter(torch.empty(heads, config.head_dim))
        self.norm_bias = nn.Parameter(torch.empty(heads, config.head_dim))
        self.out_proj = nn.Linear(width, width, bias=False)
        free_of_weight_decay(self.mix, self.decay_bias, self.rate_bias, self.erase_scale, self.write_share, self.bonus)
        free_of_weight_decay(self.norm_weight, self.norm_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' first values of a layer half way up: channels differ in how long they remember."""
        width, head = self.config.hidden_size, self.config.head_dim
        channel = torch.arange(width, dtype=torch.float32, device=self.mix.device)
        powers = torch.tensor(FIRST_MIX, device=self.mix.device)
        self.mix.copy_(1 - (channel / width) ** powers[:, None])
        place = channel / max(width - 1, 1)
        turn = (channel % head - (head - 1) / 2) / max((head - 1) / 2, 0.5)
        turn = turn * turn.abs()
        self.decay_bias.copy_(-5.5 + 6 * place ** (1 + 0.5**0.3) + 2.5 * turn)
        self.rate_bias.copy_(-0.19 + 0.3 * turn + 0.4 * (place - 0.5))
        self.erase_scale.copy_(0.71 - 0.1 * (place - 0.5))
        nn.init.constant_(self.write_share, 1.02)
        nn.init.constant_(self.bonus, -0.04)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def first_state(self, x: Tensor) -> RWKV7State:
        """An empty memory; before the first token stands a zero."""
        c, dtype = self.config, fast_dtype(x)
        return RWKV7State(
            weight=x.new_zeros(len(x), c.num_heads, c.head_dim, c.head_dim, dtype=dtype),
            tail=x.new_zeros(len(x), 1, c.hidden_size, dtype=dtype),
        )

    def describe_memories(self) -> tuple[MemoryDescription, ...]:
        """One matrix a head."""
        return (
            MemoryDescription(
                name="memory",
                period=1,
                objective=OBJECTIVES["l2"],
                rule="W ← W diag(a) − W b cᵀ − g kᵀ",
                state=self.config.hidden_size * self.config.head_dim,
            ),
        )

    def run(
        self, x: Float[Tensor, "N L hidden"], state: State, lengths: Tensor | None
    ) -> tuple[Float[Tensor, "N L hidden"], RWKV7State]:
        """See `SequenceLayer.run`."""
        if not isinstance(state, RWKV7State):
            raise TypeError(f"RWKV-7 continues from an RWKV7State, not from {type(state).__name__}")
        # The token before is a convolution with the filter (1, 0).
        before = x.new_tensor([1.0, 0.0]).repeat(x.shape[-1], 1)
        earlier, tail = short_conv(x, before, state.tail, lengths)
        for_r, for_w, for_k, for_v, for_a, for_g = torch.addcmul(
            x.unsqueeze(0), (earlier - x).unsqueeze(0), self.mix.to(x.dtype)[:, None, None]
        ).unbind()
        r, k, v = self.r_proj(for_r), self.k_proj(for_k), self.v_proj(for_v)
        decay = self.decay_up(torch.tanh(self.decay_down(for_w)))
        rate = self.rate_up(self.rate_down(for_a))
        gate = self.gate_up(torch.sigmoid(self.gate_down(for_g)))
        with torch.autocast(x.device.type, enabled=False):
            dtype = state.weight.dtype
            r, k, v, decay, rate = (t.to(dtype) for t in (r, k, v, decay, rate))
            log_w = -MOST_FORGOTTEN * torch.sigmoid(decay + self.decay_bias.to(dtype))
            rate = torch.sigmoid(rate + self.rate_bias.to(dtype))
            kappa = k * self.erase_scale.to(dtype)
            k = torch.addcmul(k, k * (rate - 1), self.write_share.to(dtype))
            head = self.config.head_dim
            r, k, v, log_w, rate, kappa = (split_heads(t, head) for t in (r, k, v, log_w, rate, kappa))
            o, weight = self._scan(r, k, v, log_w, rate, kappa, state.weight, lengths)
            o = group_norm(o.transpose(1, 2), self.norm_weight, self.norm_bias, head * self.config.norm_eps)
            own = (r * k * self.bonus.to(dtype)[:, None]).sum(-1, keepdim=True) * v
            o = o + own.transpose(1, 2)
        return self.out_proj(o.flatten(-2).to(gate.dtype) * gate), RWKV7State(weight, tail)

    def _scan(
        self,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        log_w: Tensor,
        rate: Tensor,
        kappa: Tensor,
        weight: Tensor,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What every token reads `[N, H, L, K]`, and the last fast weights."""
        kappa = safe_normalize(kappa)
        there = valid_tokens(lengths, k.shape[2], k)
        if there is not None:
            log_w = log_w * there[..., None]
            there = there.expand(k.shape[:3])
        return diagonal_scan(
            k,
            v,
            r,
            weight=weight,
            chunk_size=self.config.chunk_size,
            log_retention=log_w,
            recall_key=kappa,
            erase_key=rate * kappa,
            erase=there,
            inner_lr=there,
            min_log_retention=-MOST_FORGOTTEN,
        )


def _rank(wanted: float) -> int:
    """In steps of 32, and at least that."""
    return max(32, round(wanted / 32) * 32)
