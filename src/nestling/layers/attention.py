"""Causal softmax attention: the non-parametric solution of the associative memory (NL Eq. 62-63).

B batch, N rows, T time, L row length, H query heads, G key and value heads, D head width, S keys in view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nestling.layers.heads import NEW_FIELD
from nestling.layers.sequence import Aligned, SequenceLayer
from nestling.memory.description import MemoryDescription
from nestling.memory.state import State
from nestling.ops.rotary import rotate, rotation

SMALLEST_BLOCK = 128
"""Queries per call of a windowed attention at least: smaller calls cost more in overhead than the mask they save."""


@dataclass(frozen=True)
class AttentionConfig:
    """Settings of `SoftmaxAttention`.

    Attributes:
        hidden_size: width of the input and the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of `num_heads` (grouped queries, Ainslie et al. 2023); None takes
            as many as query heads.
        window: tokens in view, the token itself included; None sees everything.
        rope_theta: base of the rotary frequencies (Su et al. 2021); 10000 is the value of that paper and of Llama.
        head_width: of a head, even (RoPE turns pairs); None is `hidden_size / num_heads`. Qwen3 has wider heads.
        bias: biases of queries, keys and values (Qwen2).
        output_bias: bias of the output projection.
        qk_norm_eps: RMSNorm of every head's query and key before the rotation, with this epsilon (Qwen3; the gain is
            shared by the heads); None for no norm.
        rope_frequencies: radians a token by which each of the `head_dim / 2` channel pairs turns, for frequencies that
            no `rope_theta` gives (stretched contexts such as Llama 3.1's); None takes `rope_theta`'s.

    Raises:
        ValueError: sizes that do not divide, or are not positive.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int | None = None
    window: int | None = None
    rope_theta: float = 10000.0
    head_width: int | None = field(default=None, metadata=NEW_FIELD)
    bias: bool = field(default=False, metadata=NEW_FIELD)
    output_bias: bool = field(default=False, metadata=NEW_FIELD)
    qk_norm_eps: float | None = field(default=None, metadata=NEW_FIELD)
    rope_frequencies: tuple[float, ...] | None = field(default=None, metadata=NEW_FIELD)

    def __post_init__(self) -> None:
        if self.hidden_size < 1 or self.num_heads < 1:
            raise ValueError(f"hidden_size {self.hidden_size} and num_heads {self.num_heads} must be at least 1")
        if self.head_width is not None and (self.head_width < 2 or self.head_width % 2):
            raise ValueError(f"head_width must be even, rotary positions turn pairs of channels; got {self.head_width}")
        if self.head_width is None and self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of num_heads {self.num_heads}: "
                "rotary positions turn pairs of channels of a head"
            )
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 token, or None for no limit; got {self.window}")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta must be positive; got {self.rope_theta}")
        if self.qk_norm_eps is not None and self.qk_norm_eps <= 0:
            raise ValueError(f"qk_norm_eps must be positive, or None for no norm; got {self.qk_norm_eps}")
        if self.rope_frequencies is not None:
            self._check_frequencies(self.rope_frequencies)

    def _check_frequencies(self, frequencies: tuple[float, ...]) -> None:
        if len(frequencies) != self.head_dim // 2:
            raise ValueError(
                f"rope_frequencies needs one entry per channel pair, {self.head_dim // 2}; got {len(frequencies)}"
            )
        if not all(math.isfinite(f) for f in frequencies):
            raise ValueError("rope_frequencies holds NaN or infinity")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.head_width or self.hidden_size // self.num_heads


@dataclass
class AttentionState(State):
    """Keys and values of the tokens still in view, right-aligned.

    Slot j of row n holds the token at position `position[n] - S + j`; slots before the row's first token hold zeros.
    Keys are stored rotated, in the dtype of the parameters, so that a file fits the model under autocast too.
    """

    k: Float[Tensor, "N S G D"]
    v: Float[Tensor, "N S G D"]
    position: Int[Tensor, " N"]


class AttentionHeads(nn.Module):
    """The projections of multi-head attention, and what its heads answer before the output projection."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        width, kv_heads = config.head_dim, config.num_kv_heads or config.num_heads
        self.query = nn.Linear(config.hidden_size, config.num_heads * width, bias=config.bias)
        self.key = nn.Linear(config.hidden_size, kv_heads * width, bias=config.bias)
        self.value = nn.Linear(config.hidden_size, kv_heads * width, bias=config.bias)
        self.output = nn.Linear(config.num_heads * width, config.hidden_size, bias=config.output_bias)
        normed = config.qk_norm_eps is not None
        self.query_norm = nn.RMSNorm(width, eps=config.qk_norm_eps) if normed else None
        self.key_norm = nn.RMSNorm(width, eps=config.qk_norm_eps) if normed else None

    def first_state(self, x: Tensor) -> AttentionState:
        """An empty cache for the rows of `x`."""
        c = self.config
        empty = x.new_zeros(len(x), 0, c.num_kv_heads or c.num_heads, c.head_dim)
        return AttentionState(empty, empty.clone(), torch.zeros(len(x), dtype=torch.int64, device="cpu"))

    def mix(
        self,
        x: Float[Tensor, "N L hidden"],
        state: AttentionState,
        lengths: Tensor | None,
        prefix: Float[Tensor, "N P hidden"] | None = None,
    ) -> tuple[Float[Tensor, "N L inner"], AttentionState]:
        """The heads' answers without the output projection: `answer` for the queries, keys and values of `x`.

        Args:
            x: left-aligned rows, at least one slot.
            state: before the first token.
            lengths: of the rows; None when all have L tokens.
            prefix: tokens every token sees, wherever the window stands. They have no position: their scores use
                queries and keys that are not rotated, so that they mean the same to the first token and to the
                millionth.
        """
        return self.answer(*self.project(x), state, lengths, prefix)

    def project(
        self, x: Float[Tensor, "N L hidden"]
    ) -> tuple[Float[Tensor, "N L H D"], Float[Tensor, "N L G D"], Float[Tensor, "N L G D"]]:
        """Queries, keys and values, by heads and not rotated."""
        q, k = self.heads(x, self.query, self.query_norm), self.heads(x, self.key, self.key_norm)
        return q, k, self.heads(x, self.value)

    def answer(
        self,
        q: Float[Tensor, "N L H D"],
        k: Float[Tensor, "N L G D"],
        v: Float[Tensor, "N L G D"],
        state: AttentionState,
        lengths: Tensor | None,
        prefix: Float[Tensor, "N P hidden"] | None = None,
    ) -> tuple[Float[Tensor, "N L inner"], AttentionState]:
        """What `project` gave, turned by its positions and attended; see `mix`."""
        time, c = q.shape[1], self.config
        cos, sin = rotation(c.head_dim, c.rope_frequencies or c.rope_theta, state.position, time, q.device)
        plain, q, k = q, rotate(q, cos, sin), rotate(k, cos, sin)
        unseen = None
        if state.k.shape[1]:
            unseen = _unseen_slots(state)
            k = torch.cat((state.k.to(k.dtype), k), 1)
            v = torch.cat((state.v.to(v.dtype), v), 1)
        if prefix is None:
            y = attend(q, k, v, c.window, unseen)
        else:
            always_k = self.heads(prefix, self.key, self.key_norm).to(v.dtype)
            y = _attend_beside(q, plain, k, v, c.window, unseen, always_k, self.heads(prefix, self.value).to(v.dtype))
        kept = _keep_last(k, v, time, state.position, lengths, c)
        # The type of the first tokens' cache: a product with quantized or autocast weights has another.
        dtype = state.k.dtype
        return y.flatten(-2), AttentionState(kept.k.to(dtype), kept.v.to(dtype), kept.position)

    def heads(
        self, x: Float[Tensor, "N L hidden"], project: nn.Module, norm: nn.Module | None = None
    ) -> Float[Tensor, "N L H D"]:
        """One of the projections of `x`, by heads, with its norm."""
        y: Tensor = project(x).unflatten(-1, (-1, self.config.head_dim))
        return y if norm is None else norm(y).to(y.dtype)


class SoftmaxAttention(AttentionHeads, SequenceLayer):
    """Multi-head attention with rotary positions, grouped queries, an optional window and a key-value cache.

    Examples:
        >>> import torch
        >>> from nestling.layers.attention import AttentionConfig, SoftmaxAttention
        >>> layer = SoftmaxAttention(AttentionConfig(32, num_heads=2, window=8))
        >>> y, state = layer(torch.randn(1, 20, 32))
        >>> y, state = layer(torch.randn(1, 1, 32), state)  # decoding
        >>> y.shape
        torch.Size([1, 1, 32])
    """

    def run(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, AttentionState]:
        """See `SequenceLayer.run`."""
        if not isinstance(state, AttentionState):
            raise TypeError(f"softmax attention continues from an AttentionState, not from {type(state).__name__}")
        y, state = self.mix(x, state, lengths)
        return self.output(y), state

    def describe_memories(self) -> tuple[MemoryDescription, ...]:
        """The Nadaraya-Watson estimator over the tokens in view (NL Eq. 62, 63)."""
        c = self.config
        return (
            MemoryDescription(
                name="attention",
                period=None,
                objective="Σ s(k, q) |v − M|²",
                rule="solved for every query: softmax attention" + (f" over {c.window} tokens" if c.window else ""),
                state=0,
                growth=2 * (c.num_kv_heads or c.num_heads) * c.head_dim,
            ),
        )


class WindowAttention(AttentionHeads):
    """What the heads answer beside a memory, with a prefix that all tokens see; its owner calls `output` on what it
    makes of that."""

    def forward(
        self,
        x: Float[Tensor, "N L hidden"],
        state: AttentionState,
        rows: Aligned,
        prefix: Float[Tensor, "N P hidden"] | None,
    ) -> tuple[Float[Tensor, "N L inner"], AttentionState]:
        """See `AttentionHeads.mix`."""
        return self.mix(x, state, rows.lengths, prefix)


def attend(
    q: Float[Tensor, "N T H D"],
    k: Float[Tensor, "N S G D"],
    v: Float[Tensor, "N S G V"],
    window: int | None = None,
    unseen: Int[Tensor, " N"] | None = None,
    prefix: int = 0,
    scale: float | None = None,
) -> Float[Tensor, "N T H V"]:
    """Causal attention of the last T of S tokens, each to at most `window` tokens that end with itself.

    A windowed attention goes block by block, so its cost and memory grow with `T * window`, not with `T * S`.

    Args:
        q: queries.
        k: keys; the last T belong to the queries.
        v: values.
        window: tokens in view; None for all.
        unseen: leading slots of each row that hold no token.
        prefix: leading slots of `k` and `v`, before the S tokens, that every query sees.
        scale: factor on the scores; None is 1 / sqrt(D).
    """
    always, (k, v) = (k[:, :prefix], v[:, :prefix]), (k[:, prefix:], v[:, prefix:])
    time, cached = q.shape[1], k.shape[1] - q.shape[1]
    step = time if window is None else max(window, SMALLEST_BLOCK)
    blocks = []
    for start in range(0, time, step):
        stop = min(start + step, time)
        first = 0 if window is None else max(0, cached + start - window + 1)
        seen = slice(first, cached + stop)
        mask = _visible(stop - start, cached + stop - first, window, None if unseen is None else unseen - first)
        k_seen, v_seen = k[:, seen], v[:, seen]
        if prefix:
            k_seen, v_seen = (torch.cat(pair, 1) for pair in zip(always, (k_seen, v_seen), strict=True))
            if mask is None:
                mask = torch.ones(stop - start, cached + stop - first, dtype=torch.bool, device="cpu")
                mask = mask.tril(cached + start - first)
            mask = F.pad(mask, (prefix, 0), value=True)
        blocks.append(attend_block(q[:, start:stop], k_seen, v_seen, mask, scale))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _attend_beside(
    q: Tensor,
    plain: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    unseen: Tensor | None,
    prefix_k: Tensor,
    prefix_v: Tensor,
) -> Tensor:
    """`attend` with a prefix that has no position: a second half of the channels holds what is not rotated."""
    width = q.shape[-1]
    keys = torch.cat((F.pad(prefix_k, (width, 0)), F.pad(k, (0, width))), 1)
    values = torch.cat((prefix_v, v), 1)
    queries = torch.cat((q, plain.to(q.dtype)), -1)
    return attend(queries, keys, values, window, unseen, prefix_k.shape[1], width**-0.5)


def attend_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Attention under an explicit mask, or the causal one (nothing to mask for a single query) when it is None."""
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask.to(q.device),
        is_causal=mask is None and q.shape[1] > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


def _visible(queries: int, keys: int, window: int | None, unseen: Tensor | None) -> Tensor | None:
    """Which of `keys` slots the last `queries` of them see; None when plain causality says it all."""
    if unseen is not None and not bool((unseen > 0).any()):
        unseen = None
    limited = window is not None and keys > window
    if unseen is None and not limited and (queries == keys or queries == 1):
        return None
    slots = torch.arange(keys, device="cpu")
    behind = slots[keys - queries :, None] - slots
    mask = behind >= 0
    if window is not None:
        mask = mask & (behind < window)
    if unseen is None:
        return mask
    return mask & (slots >= unseen[:, None, None])[:, None]


def _unseen_slots(state: AttentionState) -> Tensor | None:
    """Leading cache slots of every row that hold no token, None when all are filled."""
    unseen = (state.k.shape[1] - state.position).clamp_min(0)
    return unseen if bool(unseen.any()) else None


def _keep_last(
    k: Tensor, v: Tensor, time: int, before: Tensor, lengths: Tensor | None, config: AttentionConfig
) -> AttentionState:
    """The state after the first `lengths` (None: all) of the last `time` slots of `k` and `v` joined their rows, which
    have read `before` tokens."""
    position = before + (time if lengths is None else lengths)
    longest = int(position.max())
    keep = longest if config.window is None else min(longest, config.window)
    if lengths is None:
        tail = slice(k.shape[1] - keep, None)
        return AttentionState(_own(k[:, tail], k), _own(v[:, tail], v), position)
    absolute = position[:, None] - keep + torch.arange(keep, device="cpu")
    index = (absolute - before[:, None] + k.shape[1] - time).clamp_min(0).to(k.device)[..., None, None]
    held = (absolute >= 0).to(k.device)[..., None, None]
    k, v = (torch.where(held, torch.take_along_dim(t, index, 1), torch.zeros_like(t[:, :1])) for t in (k, v))
    return AttentionState(k, v, position)


def _own(part: Tensor, whole: Tensor) -> Tensor:
    """`part`, not as a view that keeps a longer `whole` alive."""
    return part if part.shape == whole.shape else part.clone()
