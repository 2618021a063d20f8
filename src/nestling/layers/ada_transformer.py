"""AdaTransformer: a Transformer block whose MLP goes on learning in context (NL section 3.2, Eq. 21; Eq. 69).

N rows, L row length, H heads, D head width, K width of the memory's keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.layers.attention import AttentionConfig, AttentionHeads, AttentionState
from nestling.layers.heads import fast_dtype, free_of_weight_decay
from nestling.layers.scalar_retention import valid_tokens
from nestling.layers.sequence import Aligned, SequenceLayer
from nestling.memory.description import OBJECTIVES, MemoryDescription, write_rule
from nestling.memory.state import State, rows_of
from nestling.ops.chunk_rule import chunk_scan
from nestling.ops.normalize import safe_normalize


@dataclass(frozen=True)
class AdaTransformerConfig(AttentionConfig):
    """Settings of `AdaTransformer`: those of its attention (`AttentionConfig`), and those of its memory.

    Attributes:
        intermediate_size: K, hidden width of the SwiGLU network whose last weight is the memory; None is the paper's
            simplest case, one matrix and no hidden layer (Eq. 21, 69), where K is `hidden_size`.
        inner_lr_scale: first value of the learnable rate of the writes. Eq. 21 has 1; keys have length 1 here and
            queries the length of a hidden layer, and from 0.1 the writes of some hundred tokens are first about as
            large as what the network itself says.
        chunk_size: tokens in a chunk. It changes speed and rounding, not the result.
        norm_eps: of the norms before the memory.

    Raises:
        ValueError: as `AttentionConfig`; keys and values that are not as wide as the layer; sizes below 1.
    """

    intermediate_size: int | None = None
    inner_lr_scale: float = 0.1
    chunk_size: int = 64
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("intermediate_size", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        for name in ("inner_lr_scale", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if self.num_kv_heads not in (None, self.num_heads) or self.head_dim * self.num_heads != self.hidden_size:
            raise ValueError(
                f"the memory shares the attention's keys, which must be as wide as the layer: leave num_kv_heads "
                f"and head_width None; got {self.num_kv_heads} and {self.head_width}"
            )

    @property
    def key_width(self) -> int:
        """K."""
        return self.hidden_size if self.intermediate_size is None else self.intermediate_size


@dataclass
class AdaTransformerState(State):
    """State of `AdaTransformer`.

    Attributes:
        attention: keys and values in view.
        weight: the fast weights.
    """

    attention: AttentionState
    weight: Float[Tensor, "N hidden K"]


class SharedAttention(AttentionHeads):
    """Attention that also hands on what its memory shares: the keys, and what each value alone would say."""

    def forward(
        self, x: Float[Tensor, "N L hidden"], state: AttentionState, rows: Aligned
    ) -> tuple[Float[Tensor, "N L hidden"], Float[Tensor, "N L hidden"], Float[Tensor, "N L hidden"], AttentionState]:
        """Answers, keys and values, the values through the output projection as the answers are, and the new state."""
        q, k, v = self.project(x)
        y, state = self.answer(q, k, v, state, rows.lengths)
        return self.output(y), k.flatten(-2), self.output(v.flatten(-2)), state


class AdaTransformer(SequenceLayer):
    """Attention and, in place of the MLP, a linear attention that shares its keys and values, both with residual:

        q, k, v = W_q n, W_k n, W_v n                        n = norm(x)
        h = x + W_o Attn(k, v, q)
        W_t = W_{t-1} + l (W_o v_t) phi(norm(k_t))^T         phi of length 1, W_0 a parameter
        y_t = h_t + W_t phi(norm(h_t))

    The memory descends the dot-product objective -<W phi(k), v> from a learned start (Linear Attention++). phi is the
    gated hidden layer of SwiGLU, so that with l = 0 the block is exactly Transformer++'s; without `intermediate_size`
    it is the identity. The layer adds its residuals itself, as `ContinuumMemory` does.

    The paper leaves out norms and the output projection W_o. Here the memory takes what the attention would add to the
    residual stream if it looked at the token alone, W_o v_t. Nothing is forgotten (Eq. 21), so the writes of a long
    document add up.

    Examples:
        >>> import torch
        >>> from nestling.layers.ada_transformer import AdaTransformer, AdaTransformerConfig
        >>> layer = AdaTransformer(AdaTransformerConfig(32, num_heads=2, intermediate_size=48))
        >>> y, state = layer(torch.randn(1, 20, 32))
        >>> state.weight.shape
        torch.Size([1, 32, 48])
    """

    def __init__(self, config: AdaTransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, c = config.hidden_size, config
        self.attention_norm = nn.RMSNorm(width, eps=c.norm_eps)
        self.attention = SharedAttention(config)
        self.memory_norm = nn.RMSNorm(width, eps=c.norm_eps)
        self.shared_key_norm = nn.RMSNorm(width, eps=c.norm_eps)
        self.gate = None if c.intermediate_size is None else nn.Linear(width, c.intermediate_size, bias=False)
        self.up = None if c.intermediate_size is None else nn.Linear(width, c.intermediate_size, bias=False)
        self.down = nn.Parameter(torch.empty(width, c.key_width))
        self.log_rate = nn.Parameter(torch.empty(()))
        free_of_weight_decay(self.log_rate)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The first memory as `nn.Linear` draws its weight; the rate at `inner_lr_scale`."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.constant_(self.log_rate, math.log(self.config.inner_lr_scale))

    def first_state(self, x: Tensor) -> AdaTransformerState:
        """No token in view, and the learned memory."""
        weight = rows_of(self.down.to(fast_dtype(x)), len(x))
        return AdaTransformerState(self.attention.first_state(x), weight)

    def describe_memories(self) -> tuple[MemoryDescription, ...]:
        """The last weight of the network; the attention before it is known by its projections."""
        return (
            MemoryDescription(
                name="memory",
                period=1,
                objective=OBJECTIVES["dot"],
                rule=write_rule(retention=False, erase=False),
                state=self.down.numel(),
                initial=("down",),
            ),
        )

    def run(
        self, x: Float[Tensor, "N L hidden"], state: State, lengths: Tensor | None
    ) -> tuple[Float[Tensor, "N L hidden"], AdaTransformerState]:
        """See `SequenceLayer.run`."""
        if not isinstance(state, AdaTransformerState):
            raise TypeError(f"an AdaTransformer continues from an AdaTransformerState, not from {type(state).__name__}")
        answer, key, value, cache = self.attention(self.attention_norm(x), state.attention, Aligned(lengths))
        x = x + answer
        query = self._features(self.memory_norm(x))
        key = self._features(self.shared_key_norm(key))
        with torch.autocast(x.device.type, enabled=False):
            dtype = state.weight.dtype
            rate = self.log_rate.to(dtype).exp().expand(key.shape[:2])
            valid = valid_tokens(lengths, x.shape[1], state.weight)
            y, weight, _ = chunk_scan(
                safe_normalize(key.to(dtype)),
                -value.to(dtype),
                query.to(dtype),
                weight=state.weight,
                chunk_size=self.config.chunk_size,
                inner_lr=(rate if valid is None else rate * valid[:, 0]).contiguous(),
            )
        return x + y.to(x.dtype), AdaTransformerState(cache, weight)

    def _features(self, x: Float[Tensor, "N L hidden"]) -> Float[Tensor, "N L K"]:
        return x if self.gate is None or self.up is None else F.silu(self.gate(x)) * self.up(x)
