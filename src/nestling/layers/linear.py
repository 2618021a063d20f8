"""Matrix memories whose keys, values and rates come from the input alone.

Linear attention, RetNet, DeltaNet, Gated DeltaNet, Gated DeltaProduct, Comba and Kimi Delta Attention are its settings.

N rows, L row length, H heads, K key width, V value width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.layers.cacheable import CacheableLayer
from nestling.layers.heads import draw_filters, fast_dtype, free_of_weight_decay, group_norm, rms_norm
from nestling.layers.linear_config import LinearMemoryConfig
from nestling.layers.scalar_retention import (
    MIN_LOG_RETENTION,
    data_log_retention,
    draw_retention,
    fixed_log_retention,
    scan_memory,
    valid_tokens,
)
from nestling.memory.description import OBJECTIVES, MemoryDescription, write_rule
from nestling.memory.kept import KeptMemories
from nestling.memory.state import State, rows_of
from nestling.ops.diagonal_rule import diagonal_scan
from nestling.ops.normalize import safe_normalize
from nestling.ops.rotary import rotate, rotation
from nestling.ops.short_conv import short_conv

SOFTPLUS_OF_ONE = math.log(math.e - 1)
"""What softplus maps to 1."""


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
        W_t = W_{t-1} (a_t - b beta_t k_t k_t^T) + beta_t v_t k_t^T          with state feedback b (Comba)
        W_t = W_{t-1} diag(a_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T    with a retention by channel (KDA)
        o_t = W_t q_t

    that is the rule of `nestling.ops` with g = -v and e = a beta, l = beta, or e = 0, l = 1. Several writes a token are
    as many tokens, of which only the last reads (Gated DeltaProduct). q, k and v are projections of x through a short
    convolution and the feature map; y is the projection of the normalised and gated o.

    Examples:
        >>> import torch
        >>> from nestling.layers.linear import LinearMemory
        >>> from nestling.layers.linear_config import LinearMemoryConfig
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
        heads, inner, writes = c.num_heads, c.num_heads * c.value_width, c.writes_per_token
        self.streams = (1 + writes) * heads * c.key_width + writes * inner
        gate = inner if c.output_gate != "none" else 0
        steps = {"data": heads, "channel": heads * c.key_width}.get(c.retention, 0)
        low = c.gate_rank
        self.gate_up = nn.Linear(low, gate) if low is not None and gate else None
        self.retention_up = nn.Linear(low, steps, bias=False) if low is not None and c.retention == "channel" else None
        # One product for q, k, v, the output gate and the logits of beta and of the retention.
        self.sizes = [
            self.streams,
            gate if self.gate_up is None else self.gate_up.in_features,
            heads * writes if c.erase else 0,
            steps if self.retention_up is None else self.retention_up.in_features,
        ]
        self.in_proj = nn.Linear(c.hidden_size, sum(self.sizes), bias=False)
        self.conv = nn.Parameter(torch.empty(self.streams, c.conv_size)) if c.conv_size > 1 else None
        self.A_log = nn.Parameter(torch.empty(heads)) if steps else None
        by_channel = (heads, c.key_width) if c.retention == "channel" else (heads,)
        self.dt_bias = nn.Parameter(torch.empty(by_channel)) if steps else None
        self.erase_share = nn.Parameter(torch.empty(heads)) if c.state_feedback else None
        self.key_share = nn.Parameter(torch.empty(heads)) if c.output_feedback is not None else None
        # RMSNorm shares its gain among the heads; GroupNorm has a gain and a bias for every channel.
        group = c.output_norm == "group"
        shape = (heads, c.value_width) if group else (c.value_width,)
        self.norm_weight = nn.Parameter(torch.ones(shape)) if c.output_norm != "none" else None
        self.norm_bias = nn.Parameter(torch.zeros(shape)) if group else None
        self.out_proj = nn.Linear(inner, c.hidden_size, bias=False)
        self.initial = nn.Parameter(torch.empty(heads, c.value_width, c.key_width)) if c.initial else None
        self.initial_sum = nn.Parameter(torch.empty(heads, c.key_width)) if c.initial and c.denominator else None
        free_of_weight_decay(self.conv, self.A_log, self.dt_bias, self.norm_weight, self.norm_bias, self.initial_sum)
        free_of_weight_decay(self.erase_share, self.key_share)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The convolution near the identity; retentions as Mamba-2 draws them, Comba's b as its code has it; a first
        memory as a linear layer's weights, whose sum of keys weighs as much as one token of keys 1."""
        if self.conv is not None:
            draw_filters(self.conv)
        if self.A_log is not None and self.dt_bias is not None:
            draw_retention(self.A_log, self.dt_bias)
        if self.erase_share is not None:
            nn.init.ones_(self.erase_share)
        if self.key_share is not None and self.config.output_feedback is not None:
            nn.init.constant_(self.key_share, self.config.output_feedback)
        if self.initial is not None:
            nn.init.normal_(self.initial, std=self.config.key_width**-0.5)
        if self.initial_sum is not None:
            nn.init.constant_(self.initial_sum, SOFTPLUS_OF_ONE)

    def first_state(self, x: Tensor) -> LinearMemoryState:
        """An empty memory, or the learned one."""
        c, dtype = self.config, fast_dtype(x)
        shape = (len(x), c.num_heads, c.value_width + c.denominator, c.key_width)
        return LinearMemoryState(
            weight=x.new_zeros(shape, dtype=dtype) if self.initial is None else rows_of(self._learned(dtype), len(x)),
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
        rate, by_channel = "l" if c.erase else "", c.retention == "channel"
        rule = write_rule(retention=c.retention != "none", erase=c.erase, rate=rate, by_channel=by_channel)
        if c.writes_per_token > 1:
            rule = f"{rule}; {c.writes_per_token} times a token"
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
        gate = gate if self.gate_up is None else self.gate_up(gate)
        step = step if self.retention_up is None else self.retention_up(step)
        tail = state.conv
        if self.conv is not None and tail is not None:
            streams, tail = short_conv(streams, self.conv, tail, lengths)
        with torch.autocast(x.device.type, enabled=False):
            dtype = state.weight.dtype
            q, k, v = self._tokens(streams.to(dtype), state)
            rate, log_a = self._rates(beta.to(dtype), step.to(dtype), valid_tokens(lengths, time, v))
            o, weight = self._scan(q, k, v, rate, log_a, state.weight, gate.dtype)
            o = self._normalised(o if kept is None else kept.combine(q, o))
        after = None if state.position is None else state.position + (time if lengths is None else lengths)
        return self._output(o.to(gate.dtype), gate), LinearMemoryState(weight, tail, after)

    def _tokens(self, streams: Tensor, state: LinearMemoryState) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[N, H, L, K]`, and keys and values `[N, H, L * writes, D]`."""
        c = self.config
        queries, writes = c.num_heads, c.writes_per_token * c.num_heads
        if c.feature_map == "silu":
            streams = F.silu(streams)
        qk, v = streams.split(((queries + writes) * c.key_width, writes * c.value_width), -1)
        qk = qk.unflatten(-1, (queries + writes, c.key_width))
        if c.feature_map == "elu":
            qk = F.elu(qk) + 1
        if c.normalise_qk:
            qk = safe_normalize(qk)
        if c.positions == "rope":
            qk = rotate(qk, *rotation(c.key_width, c.rope_theta, state.position, qk.shape[1], qk.device))
        q, k = qk.split((queries, writes), 2)
        if self.key_share is not None:
            # With several writes, the key of the last.
            q = q - self.key_share.to(q.dtype)[:, None] * k[:, :, -queries:]
        v = v.unflatten(-1, (writes, c.value_width))
        return q.transpose(1, 2), self._by_head(k), self._by_head(F.pad(v, (0, 1), value=1.0) if c.denominator else v)

    def _by_head(self, t: Tensor) -> Tensor:
        """`[N, L, writes * H, ...]` to `[N, H, L * writes, ...]`."""
        return t.unflatten(2, (-1, self.config.num_heads)).movedim(3, 1).flatten(2, 3)

    def _rates(self, beta: Tensor, step: Tensor, valid: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """l `[N, H, L * writes]` and log a `[N, H, L]` or `[N, H, L, K]`; None: 1 and 0.

        Tokens that are not there have l = log a = 0.
        """
        c = self.config
        shape = (len(beta), c.num_heads, beta.shape[1])
        log_a = None
        if c.retention == "fixed":
            log_a = fixed_log_retention(c.num_heads, beta).expand(shape).contiguous()
        elif self.A_log is not None and self.dt_bias is not None:
            step = step.unflatten(-1, self.dt_bias.shape)
            step = F.softplus(step + self.dt_bias.to(step.dtype)).transpose(1, 2)
            log_a = data_log_retention(step, self.A_log).contiguous()
        if log_a is not None and valid is not None:
            log_a = log_a * (valid if log_a.dim() == 3 else valid[..., None])
        there = None if valid is None else valid.expand(shape).repeat_interleave(c.writes_per_token, -1)
        if not c.erase:
            return there, log_a
        strength = self._by_head(torch.sigmoid(beta)).contiguous()
        strength = 2 * strength if c.allow_neg_eigval else strength
        return strength if there is None else strength * there, log_a

    def _scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rate: Tensor | None,
        log_a: Tensor | None,
        weight: Tensor,
        precision: torch.dtype,
    ) -> tuple[Float[Tensor, "N H L columns"], Float[Tensor, "N H columns K"]]:
        """The rule over all writes; what is read after a token's last."""
        c, writes = self.config, self.config.writes_per_token
        if writes > 1:
            q = _between(q, writes - 1, 0)
            log_a = None if log_a is None else _between(log_a, 0, writes - 1)
        share = None if self.erase_share is None else torch.sigmoid(self.erase_share.to(k.dtype))[:, None]
        if c.retention == "channel" and log_a is not None:
            rates: dict[str, Tensor | None] = {"inner_lr": rate}
            if c.erase and rate is not None:
                rates["recall_key"] = log_a.exp() * k if share is None else k
                rates["erase"] = rate if share is None else share * rate
            o, weight = diagonal_scan(
                k,
                v,
                q,
                weight=weight,
                chunk_size=c.chunk_size,
                log_retention=log_a,
                min_log_retention=MIN_LOG_RETENTION,
                **rates,
            )
        else:
            o, weight = scan_memory(
                k,
                v,
                q,
                weight=weight,
                kernel=c.kernel,
                chunk_size=c.chunk_size,
                log_retention=log_a,
                inner_lr=rate,
                erase=c.erase,
                feedback=share,
                precision=precision,
            )
        return o[:, :, writes - 1 :: writes], weight

    def _normalised(self, o: Float[Tensor, "N H L columns"]) -> Float[Tensor, "N L H V"]:
        c = self.config
        if c.denominator:
            # Without a single matching key both are 0.
            o = o[..., :-1] / (o[..., -1:] + c.norm_eps)
        o = o.transpose(1, 2)
        if self.norm_weight is None:
            return o
        if self.norm_bias is None:
            return rms_norm(o, self.norm_weight, c.norm_eps)
        return group_norm(o, self.norm_weight, self.norm_bias, c.norm_eps)

    def _output(self, o: Float[Tensor, "N L H V"], gate: Tensor) -> Float[Tensor, "N L hidden"]:
        o = o.flatten(-2)
        if self.config.output_gate != "none":
            o = o * (F.silu(gate) if self.config.output_gate == "silu" else torch.sigmoid(gate))
        return self.out_proj(o)


def _own(state: State) -> LinearMemoryState:
    if not isinstance(state, LinearMemoryState):
        raise TypeError(f"a linear memory continues from a LinearMemoryState, not from {type(state).__name__}")
    return state


def _between(t: Tensor, before: int, after: int) -> Tensor:
    """Every token of `[N, H, L, ...]` among zeros, `before` and `after` it."""
    zeros = t.new_zeros(*t.shape[:3], 1, *t.shape[3:])
    return torch.cat([*[zeros] * before, t.unsqueeze(3), *[zeros] * after], 3).flatten(2, 3)
