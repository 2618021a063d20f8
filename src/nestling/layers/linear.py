"""Matrix memories whose keys, values and rates come from the input alone: linear attention, RetNet, (Gated) DeltaNet.

N rows, L row length, H heads, K key width, V value width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.layers.cacheable import CacheableLayer
from nestling.layers.heads import NEW_FIELD, draw_filters, fast_dtype, free_of_weight_decay, rms_norm
from nestling.layers.scalar_retention import (
    KERNELS,
    Kernel,
    data_log_retention,
    draw_retention,
    fixed_log_retention,
    scan_memory,
    valid_tokens,
)
from nestling.memory.description import OBJECTIVES, MemoryDescription, write_rule
from nestling.memory.kept import KeptMemories
from nestling.memory.state import State
from nestling.ops.normalize import safe_normalize
from nestling.ops.rotary import rotate, rotation
from nestling.ops.short_conv import short_conv

SOFTPLUS_OF_ONE = math.log(math.e - 1)
"""What softplus maps to 1."""

CHOICES = {
    "feature_map": ("identity", "elu", "silu"),
    "positions": ("none", "rope"),
    "retention": ("none", "fixed", "data"),
    "output_gate": ("none", "silu", "sigmoid"),
    "output_norm": ("none", "rms", "group"),
    "kernel": KERNELS,
}


@dataclass(frozen=True)
class LinearMemoryConfig:
    """Settings of `LinearMemory`. The defaults are Gated DeltaNet's; `nestling.presets` has the others.

    Attributes:
        hidden_size: width of the layer's input and output.
        num_heads: H.
        key_dim: K, width of a head's keys and queries; None is `hidden_size / num_heads`.
        value_expansion: V / K.
        feature_map: of keys and queries: "identity" (RetNet), "elu" is elu(x) + 1 (linear attention), and "silu" the
            DeltaNets', which apply it to the values too.
        normalise_qk: scale keys and queries to length 1. The erase needs it: with |k| <= 1 it is a contraction.
        denominator: divide by the sum of all weights, y = sum (q.k) v / sum (q.k) (linear attention).
        positions: "rope" turns queries and keys by their position (RetNet). xPos adds a factor zeta^n to queries and
            zeta^-n to keys, which is the retention zeta^(n - m) itself (RetNet, Eq. 3 to 4: with one gamma a head, it
            leaves the exponent), so there is no further scale to set.
        rope_theta: base of the rotary frequencies.
        retention: "none" is a_t = 1; "fixed" is 1 - 2^(-5 - h) in head h (RetNet); "data" is
            exp(-exp(A_log) softplus(W_a x + dt_bias)) (Gated DeltaNet, after Mamba-2).
        erase: the delta rule: what the memory recalls at a key is taken away before the value is written.
        allow_neg_eigval: beta in (0, 2) in place of (0, 1), which state tracking needs (Grazzi et al. 2024,
            arXiv:2411.12537).
        conv_size: width of the causal convolution over q, k and v; 1 is none.
        output_gate: multiply the normalised output by silu or sigmoid of a projection of x.
        output_norm: of every head: "rms", "group" (centred, with a bias: RetNet's GroupNorm), or "none".
        chunk_size: tokens in a chunk. It changes speed and rounding, not the result.
        norm_eps: of the output norm and the denominator.
        initial: learn what the memory holds before the first token (NL section 3.2: linear attention with it is Linear
            Attention++); without, it is empty. With a denominator the first sum of keys is learned too, and positive.
        kernel: whose code runs the memory. "nestling" is this package's own, on every device. "fla" is
            flash-linear-attention's Triton kernels on a CUDA GPU (`ops.fla_kernels`: precision and limits), which is
            checked when the layer reads its first token, so that such a config loads anywhere. Neither stands in for
            the other.

    Raises:
        ValueError: sizes that do not divide, an unknown choice, or settings that exclude each other.
    """

    hidden_size: int
    num_heads: int
    key_dim: int | None = None
    value_expansion: int = 1
    feature_map: Literal["identity", "elu", "silu"] = "silu"
    normalise_qk: bool = True
    denominator: bool = False
    positions: Literal["none", "rope"] = "none"
    rope_theta: float = 10000.0
    retention: Literal["none", "fixed", "data"] = "data"
    erase: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    output_gate: Literal["none", "silu", "sigmoid"] = "silu"
    output_norm: Literal["none", "rms", "group"] = "rms"
    chunk_size: int = 64
    norm_eps: float = 1e-6
    kernel: Kernel = "nestling"
    initial: bool = field(default=False, metadata=NEW_FIELD)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "key_dim", "value_expansion", "conv_size", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}, not {getattr(self, name)!r}")
        if self.key_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; set key_dim"
            )
        if self.positions == "rope" and self.key_width % 2:
            raise ValueError(f"key_dim {self.key_width} must be even: rotary positions turn pairs of channels")
        self._check_together()

    def _check_together(self) -> None:
        if self.erase and not self.normalise_qk:
            raise ValueError("erase=True needs normalise_qk=True: with keys longer than 1 the erase is no contraction")
        if self.allow_neg_eigval and not self.erase:
            raise ValueError("allow_neg_eigval=True widens the rate of the erase; it needs erase=True")
        if self.denominator and (self.feature_map != "elu" or self.positions != "none" or self.erase):
            raise ValueError(
                "denominator=True divides by a sum of (q.k), which only feature_map='elu' without positions or erase "
                "keeps from crossing zero"
            )

    @property
    def key_width(self) -> int:
        """K."""
        return self.hidden_size // self.num_heads if self.key_dim is None else self.key_dim

    @property
    def value_width(self) -> int:
        """V."""
        return self.key_width * self.value_expansion


@dataclass
class LinearMemoryState(State):
    """State of `LinearMemory`.

    Attributes:
        weight: the fast weights; with a denominator, the last row is the sum of the keys.
        conv: the last `conv_size - 1` inputs of the convolution; None without one.
        position: tokens read so far, int64 on the CPU; None without rotary positions.
    """

    weight: Float[Tensor, "N H V K"]
    conv: Float[Tensor, "N past D"] | None
    position: Int[Tensor, " N"] | None


class LinearMemory(CacheableLayer):
    """One matrix W a head, written token by token and read by the query after the write:

        W_t = a_t W_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T          with erase (Gated DeltaNet, Eq. 10)
        W_t = a_t W_{t-1} + v_t k_t^T                                        without (RetNet, Eq. 1, 6)
        o_t = W_t q_t

    that is the rule of `nestling.ops` with g = -v and e = a beta, l = beta, or e = 0, l = 1. q, k and v are
    projections of x through a short convolution and the feature map; y is the projection of the normalised and gated o.

    Examples:
        >>> import torch
        >>> from nestling.layers.linear import LinearMemory, LinearMemoryConfig
        >>> layer = LinearMemory(LinearMemoryConfig(hidden_size=32, num_heads=2))  # Gated DeltaNet
        >>> mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # left padding
        >>> y, state = layer(torch.randn(2, 5, 32), mask=mask)
        >>> bool(y[0, :2].any())
        False
    """

    def __init__(self, config: LinearMemoryConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        heads, inner = c.num_heads, c.num_heads * c.value_width
        self.streams = 2 * heads * c.key_width + inner
        gate = inner if c.output_gate != "none" else 0
        steps = heads if c.retention == "data" else 0
        # One product for q, k, v, the output gate and the logits of beta and of the retention.
        self.sizes = [self.streams, gate, heads if c.erase else 0, steps]
        self.in_proj = nn.Linear(c.hidden_size, sum(self.sizes), bias=False)
        self.conv = nn.Parameter(torch.empty(self.streams, c.conv_size)) if c.conv_size > 1 else None
        self.A_log = nn.Parameter(torch.empty(heads)) if steps else None
        self.dt_bias = nn.Parameter(torch.empty(heads)) if steps else None
        # RMSNorm shares its gain among the heads; GroupNorm has a gain and a bias for every channel.
        group = c.output_norm == "group"
        shape = (heads, c.value_width) if group else (c.value_width,)
        self.norm_weight = nn.Parameter(torch.ones(shape)) if c.output_norm != "none" else None
        self.norm_bias = nn.Parameter(torch.zeros(shape)) if group else None
        self.out_proj = nn.Linear(inner, c.hidden_size, bias=False)
        self.initial = nn.Parameter(torch.empty(heads, c.value_width, c.key_width)) if c.initial else None
        self.initial_sum = nn.Parameter(torch.empty(heads, c.key_width)) if c.initial and c.denominator else None
        free_of_weight_decay(self.conv, self.A_log, self.dt_bias, self.norm_weight, self.norm_bias, self.initial_sum)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The convolution near the identity; retentions as Mamba-2 draws them; a first memory as a linear layer's
        weights, whose sum of keys weighs as much as one token of keys 1."""
        if self.conv is not None:
            draw_filters(self.conv)
        if self.A_log is not None and self.dt_bias is not None:
            draw_retention(self.A_log, self.dt_bias)
        if self.initial is not None:
            nn.init.normal_(self.initial, std=self.config.key_width**-0.5)
        if self.initial_sum is not None:
            nn.init.constant_(self.initial_sum, SOFTPLUS_OF_ONE)

    def first_state(self, x: Tensor) -> LinearMemoryState:
        """An empty memory, or the learned one."""
        c, dtype = self.config, fast_dtype(x)
        shape = (len(x), c.num_heads, c.value_width + c.denominator, c.key_width)
        return LinearMemoryState(
            weight=x.new_zeros(shape, dtype=dtype) if self.initial is None else self._learned(dtype).expand(shape),
            conv=None if self.conv is None else x.new_zeros(len(x), c.conv_size - 1, self.streams, dtype=dtype),
            position=torch.zeros(len(x), dtype=torch.int64, device="cpu") if c.positions == "rope" else None,
        )

    def _learned(self, dtype: torch.dtype) -> Float[Tensor, "H V K"]:
        """The first weights, with a denominator below them the first sum of keys."""
        assert self.initial is not None
        first = self.initial.to(dtype)
        if self.initial_sum is None:
            return first
        return torch.cat([first, F.softplus(self.initial_sum.to(dtype))[:, None]], 1)

    def describe_memories(self) -> tuple[MemoryDescription, ...]:
        """One matrix a head; the chunk is a matter of speed, so every token updates it."""
        c = self.config
        rule = write_rule(retention=c.retention != "none", erase=c.erase, rate="l" if c.erase else "")
        return (
            MemoryDescription(
                name="memory",
                period=1,
                objective=OBJECTIVES["l2" if c.erase else "dot"],
                rule=rule,
                state=c.num_heads * (c.value_width + c.denominator) * c.key_width,
                initial=tuple(n for n in ("initial", "initial_sum") if getattr(self, n) is not None),
            ),
        )

    def memory_of(self, state: State) -> list[Float[Tensor, "N H columns K"]]:
        """See `CacheableLayer.memory_of`."""
        state = _own(state)
        return [state.weight]

    def restart(self, state: State, fresh: State) -> LinearMemoryState:
        """See `CacheableLayer.restart`; rotary positions go on too, so that kept keys stay where they were."""
        state = _own(state)
        return replace(_own(fresh), conv=state.conv, position=state.position)

    def run_with_kept(
        self, x: Float[Tensor, "N L hidden"], state: State, lengths: Tensor | None, kept: KeptMemories | None
    ) -> tuple[Float[Tensor, "N L hidden"], LinearMemoryState]:
        """See `CacheableLayer.run_with_kept`."""
        state, time = _own(state), x.shape[1]
        streams, gate, beta, step = self.in_proj(x).split(self.sizes, -1)
        tail = state.conv
        if self.conv is not None and tail is not None:
            streams, tail = short_conv(streams, self.conv, tail, lengths)
        with torch.autocast(x.device.type, enabled=False):
            dtype = state.weight.dtype
            q, k, v = self._tokens(streams.to(dtype), state)
            rate, log_a = self._rates(beta.to(dtype), step.to(dtype), valid_tokens(lengths, time, v))
            o, weight = scan_memory(
                k,
                v,
                q,
                weight=state.weight,
                kernel=self.config.kernel,
                chunk_size=self.config.chunk_size,
                log_retention=log_a,
                inner_lr=rate,
                erase=self.config.erase,
                precision=gate.dtype,
            )
            o = self._normalised(o if kept is None else kept.combine(q, o))
        after = None if state.position is None else state.position + (time if lengths is None else lengths)
        return self._output(o.to(gate.dtype), gate), LinearMemoryState(weight, tail, after)

    def _tokens(self, streams: Tensor, state: LinearMemoryState) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys `[N, H, L, K]` and values `[N, H, L, V]`."""
        c = self.config
        if c.feature_map == "silu":
            streams = F.silu(streams)
        qk, v = streams.split((2 * c.num_heads * c.key_width, c.num_heads * c.value_width), -1)
        qk = qk.unflatten(-1, (2 * c.num_heads, c.key_width))
        if c.feature_map == "elu":
            qk = F.elu(qk) + 1
        if c.normalise_qk:
            qk = safe_normalize(qk)
        if c.positions == "rope":
            qk = rotate(qk, *rotation(c.key_width, c.rope_theta, state.position, qk.shape[1], qk.device))
        q, k = (t.transpose(1, 2) for t in qk.split(c.num_heads, 2))
        v = v.unflatten(-1, (c.num_heads, c.value_width)).transpose(1, 2)
        return q, k, F.pad(v, (0, 1), value=1.0) if c.denominator else v

    def _rates(self, beta: Tensor, step: Tensor, valid: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """l and log a `[N, H, L]` (None: 1 and 0); tokens that are not there have l = log a = 0."""
        c = self.config
        shape = (len(beta), c.num_heads, beta.shape[1])
        log_a = None
        rate = None if valid is None else valid.expand(shape).contiguous()
        if c.retention == "fixed":
            log_a = fixed_log_retention(c.num_heads, beta).expand(shape).contiguous()
        elif self.A_log is not None and self.dt_bias is not None:
            step = F.softplus(step + self.dt_bias.to(step.dtype)).transpose(1, 2)
            log_a = data_log_retention(step, self.A_log).contiguous()
        if log_a is not None and valid is not None:
            log_a = log_a * valid
        if c.erase:
            strength = torch.sigmoid(beta).transpose(1, 2).contiguous()
            strength = 2 * strength if c.allow_neg_eigval else strength
            rate = strength if valid is None else strength * valid
        return rate, log_a

    def _normalised(self, o: Float[Tensor, "N H L columns"]) -> Float[Tensor, "N L H V"]:
        c = self.config
        if c.denominator:
            # Without a single matching key both are 0.
            o = o[..., :-1] / (o[..., -1:] + c.norm_eps)
        o = o.transpose(1, 2)
        if self.norm_weight is None:
            return o
        if c.output_norm == "group":
            o = o - o.mean(-1, keepdim=True)
        o = rms_norm(o, self.norm_weight, c.norm_eps)
        return o if self.norm_bias is None else o + self.norm_bias.to(o.dtype)

    def _output(self, o: Float[Tensor, "N L H V"], gate: Tensor) -> Float[Tensor, "N L hidden"]:
        o = o.flatten(-2)
        if self.config.output_gate != "none":
            o = o * (F.silu(gate) if self.config.output_gate == "silu" else torch.sigmoid(gate))
        return self.out_proj(o)


def _own(state: State) -> LinearMemoryState:
    if not isinstance(state, LinearMemoryState):
        raise TypeError(f"a linear memory continues from a LinearMemoryState, not from {type(state).__name__}")
    return state
