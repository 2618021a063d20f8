"""TTT-Linear and TTT-MLP (Sun et al., Learning to (Learn at Test Time), arXiv:2407.04620)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.layers.heads import draw_filters, fast_dtype, free_of_weight_decay
from nestling.layers.sequence import SequenceLayer
from nestling.layers.ttt_config import TTTConfig
from nestling.layers.ttt_inner import FIRST_DEVIATION, InnerModel
from nestling.memory.bank import BankState
from nestling.memory.description import OBJECTIVES, MemoryDescription, write_rule
from nestling.memory.grid import Grid
from nestling.memory.state import State
from nestling.ops.rotary import rotate, rotation
from nestling.ops.short_conv import short_conv

__all__ = ["TTTConfig", "TTTLayer", "TTTState"]

BOUND = 1e3
"""Entries of q, k and v beyond this count as this: a step grows with their square and is read with them once more."""


@dataclass
class TTTState(State):
    """State of `TTTLayer`.

    Attributes:
        memory: fast weights at the mini-batch's start, and after the last token (with step="mean" before its c_i).
        conv: the last `conv_size - 1` inputs of the convolutions.
        position: tokens read so far, `[N]` int64 on the CPU.
    """

    memory: BankState
    conv: Tensor
    position: Tensor


class TTTLayer(SequenceLayer):
    """A model in every head that learns, while it reads, to reconstruct a view of each token from another view.

    With f(x) = x + LN(f_res(x; W)) and a mini-batch of `chunk_size` tokens that starts with the fast weights W_0:

        q_t, k_t, v_t: views of token t; q and k carry rotary positions within the mini-batch
        G_t = gradient of 1/2 |f(k_t; W) - v_t|^2 at W = W_0                                    (Eq. 4, section 2.4)
        eta_t = eta_base sigmoid(theta . x_t + bias) / D, a number per head                     (section 2.7)
        W_t = W_0 - sum_{s <= t} eta_s G_s,   o_t = f(q_t; W_t)                                 (section 2.4, Eq. 5)

    The dual form (section 2.5) is the engine's closed form with retention 1 and no erase, for every layer of the inner
    model; a read of an MLP is a cascade of two. D in the rate makes the inner loss a mean over channels, as in the
    authors' code. Nothing is forgotten, yet the fast weights settle: LN(z) does not change when z grows, so gradients
    are orthogonal to z, every step makes z longer, and gradients shrink with its length.

    Examples:
        >>> import torch
        >>> from nestling.layers.ttt import TTTLayer
        >>> from nestling.layers.ttt_config import TTTConfig
        >>> layer = TTTLayer(TTTConfig(hidden_size=32, num_heads=2, inner="mlp"))
        >>> y, state = layer(torch.randn(1, 20, 32))
        >>> y.shape
        torch.Size([1, 20, 32])
    """

    def __init__(self, config: TTTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.shared = c.conv_size > 1
        self.in_proj = nn.Linear(c.hidden_size, (2 if self.shared else 3) * c.hidden_size, bias=False)
        self.conv_q = nn.Parameter(torch.empty(c.hidden_size, c.conv_size)) if self.shared else None
        self.conv_k = nn.Parameter(torch.empty(c.hidden_size, c.conv_size)) if self.shared else None
        self.rate_proj = nn.Linear(c.hidden_size, c.num_heads)
        self.inner = InnerModel(c)
        self.token_scale = nn.Parameter(torch.empty(c.chunk_size)) if c.step == "mean" else None
        self.gate_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False) if c.output_gate else None
        self.out_norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        free_of_weight_decay(self.conv_q, self.conv_k, self.token_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rates at half of eta_base, c_i = 1 / i, the convolutions near identity."""
        nn.init.normal_(self.rate_proj.weight, std=FIRST_DEVIATION)
        nn.init.zeros_(self.rate_proj.bias)
        for conv in (self.conv_q, self.conv_k):
            if conv is not None:
                draw_filters(conv)
        with torch.no_grad():
            if self.token_scale is not None:
                self.token_scale.copy_(1.0 / torch.arange(1, self.config.chunk_size + 1))

    def first_state(self, x: Tensor) -> TTTState:
        """The meta-learned fast weights, an empty convolution tail."""
        c, dtype = self.config, fast_dtype(x)
        return TTTState(
            memory=self.inner.first_weights(len(x), dtype),
            conv=x.new_zeros(len(x), c.conv_size - 1, c.hidden_size, dtype=dtype),
            position=torch.zeros(len(x), dtype=torch.long, device="cpu"),
        )

    def describe_memories(self) -> tuple[MemoryDescription, ...]:
        """The inner model, read at every token's own weights."""
        rule = write_rule(retention=False, erase=False)
        return (
            MemoryDescription(
                name=f"inner {self.config.inner} model",
                period=1,
                objective=OBJECTIVES["l2"],
                rule=f"{rule}; g at the start of {self.config.chunk_size} tokens",
                state=sum(w.numel() for w in self.inner.initial),
                initial=tuple(f"inner.initial.{i}" for i in range(len(self.inner.initial))),
            ),
        )

    def run(
        self, x: Float[Tensor, "N L hidden"], state: State, lengths: Tensor | None
    ) -> tuple[Float[Tensor, "N L hidden"], TTTState]:
        """See `SequenceLayer.run`."""
        if not isinstance(state, TTTState):
            raise TypeError(f"a TTT layer continues from a TTTState, not from the state {type(state).__name__}")
        views, conv = self._views(x, state.conv, lengths)
        rate = self.rate_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            o, memory = self._learn(views, rate, state, lengths)
        o = self.out_norm(o.transpose(1, 2).flatten(-2).to(x.dtype))
        if self.gate_proj is not None:
            o = o * F.gelu(self.gate_proj(x))
        after = state.position + (x.shape[1] if lengths is None else lengths)
        return self.out_proj(o), TTTState(memory, conv, after)

    def _views(self, x: Tensor, tail: Tensor, lengths: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """q, k and v `[N, L, hidden]`, and the convolutions' new tail."""
        streams = self.in_proj(x).split(self.config.hidden_size, -1)
        if self.conv_q is None or self.conv_k is None:
            return streams, tail
        q, after = short_conv(streams[0], self.conv_q, tail, lengths)
        k, _ = short_conv(streams[0], self.conv_k, tail, lengths)
        return (q, k, streams[1]), after

    def _learn(
        self, views: tuple[Tensor, ...], rate: Tensor, state: TTTState, lengths: Tensor | None
    ) -> tuple[Tensor, BankState]:
        """All mini-batches: outputs `[N, H, L, D]` and the new fast weights."""
        c, dtype = self.config, state.conv.dtype
        q, k, v = (v.to(dtype).clamp(-BOUND, BOUND).unflatten(-1, (c.num_heads, -1)).transpose(1, 2) for v in views)
        cos, sin = self._rotation(state.position, rate.shape[1], q.device)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        eta = c.base_lr / c.head_dim * torch.sigmoid(rate.to(dtype)).transpose(1, 2)
        scale = None if self.token_scale is None else self.token_scale.to(dtype).clamp_min(0)[:, None]
        grid = Grid.of(state.position, lengths, rate.shape[1], c.chunk_size)
        return self.inner(q, k, v, eta, state.memory, grid, scale)

    def _rotation(self, position: Tensor, time: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[N, 1, L, D / 2]` of the tokens' positions within their mini-batches."""
        c = self.config
        cos, sin = rotation(c.head_dim, c.rope_theta, None, c.chunk_size, device)
        slots = (position.to(device)[:, None] + torch.arange(time, device=device)) % c.chunk_size
        return cos[0, slots, 0][:, None], sin[0, slots, 0][:, None]
