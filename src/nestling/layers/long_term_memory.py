"""The neural long-term memory (Titans section 3): what reads and writes it, without a block around it.

N rows, L tokens of a call, H heads, K = V = D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.layers.bank_loop import BankLoop
from nestling.layers.chunks import Span, learn_chunk, scan_chunks
from nestling.layers.heads import draw_filters, fast_dtype, free_of_weight_decay, logit, merge_normalised, split_heads
from nestling.layers.neural_memory_config import NeuralMemoryConfig
from nestling.layers.rates import Gates, Scales, chunk_rates, rate_rule
from nestling.layers.sequence import Aligned
from nestling.layers.token_window import TokenWindow, learn_window
from nestling.memory.bank import BankState, MemoryBank, Mix
from nestling.memory.description import SURPRISE, MemoryDescription, describe_rule
from nestling.memory.grid import Grid
from nestling.memory.kept import KeptMemories
from nestling.memory.lesson import Rates
from nestling.memory.simplex import SimplexBank
from nestling.memory.state import State
from nestling.ops.normalize import safe_normalize
from nestling.ops.short_conv import short_conv

_BOUND = 1e17  # the square of such an entry is finite in float32


@dataclass
class LongTermState(State):
    """State of `LongTermMemory`.

    Attributes:
        bank: the memories M_t, those at the chunk's start, and the surprises S_t.
        conv: the last `conv_size - 1` inputs of the convolutions of queries, keys and values.
        rates: logits of the current chunk's rates; None with rates of every token.
        position: tokens written so far, int64 on the CPU.
        window: key, value and log importance of the last `objective_window - 1` tokens; None without a window.
    """

    bank: BankState
    conv: Float[Tensor, "N past streams"]
    rates: Float[Tensor, "N logits"] | None
    position: Int[Tensor, " N"]
    window: Float[Tensor, "N H before token"] | None = None


@dataclass
class Retrieval(State):
    """What `LongTermMemory` needs to answer without learning.

    Attributes:
        weights: fast weights M* that answer.
        conv: the last `conv_size - 1` inputs of the queries' convolution.
    """

    weights: list[Tensor]
    conv: Float[Tensor, "N past hidden"]


class LongTermMemory(nn.Module):
    """One deep memory a head that learns k -> v in context (Titans Eq. 8-15).

        q_t, k_t, v_t = silu(conv(x_t W_Q)), silu(conv(x_t W_K)), silu(conv(x_t W_V));  q, k of length 1
        S_t = eta_t S_{t-1} - theta_t grad l(M_{t'}; k_t, v_t)         (Eq. 14; t' the start of the chunk, Eq. 16)
        M_t = (1 - alpha_t) M_{t-1} + S_t                              (Eq. 13)
        y_t = M_t(q_t)                                                 (Eq. 15; the token's own write is in it)

    In the words of this package 1 - alpha_t is the retention a_t, eta_t the momentum b_t and theta_t the inner learning
    rate l_t. All three are functions of the token, kept where the memory is stable (`rates.chunk_rates`):
    a_t = sigmoid(x W_alpha + bias)^(1/16), b_t = sigmoid(x W_eta + bias),
    l_t = share * sigmoid(x W_theta + bias) * max(1/C, 1 - a_t) * (1 - b_t).

    With `gradient="online"` the gradient of the output weight is taken at M_{t-1}, which is Titans' recurrent form
    (Eq. 32-33, token by token, whatever the chunk). It follows weights that the surprise still moves, and is stable
    where a surprise fades with the memory: b_t = a_t beta with one learned beta a head, and l_t up to
    2 a_t (1 - beta)^2 / (1 + beta), which is far above 1/C.

    With `divergence="kl"` the memory's state is the logarithms of its weights (`memory.simplex`).

    With an `objective_window` of c > 1 the gradient of Eq. 14 is that of the window's mean loss,
    sum_i gamma_i grad l(M_{t'}; k_i, v_i) / sum_i gamma_i over t - c < i <= t, gamma_i = sigmoid(x_i W_gamma + bias):
    the Omega rule (NL Eq. 68).

    A value longer than sqrt(D) is scaled to that length, so that hostile input cannot set targets out of reach.
    """

    def __init__(self, config: NeuralMemoryConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.in_proj = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=False)
        self.conv = nn.Parameter(torch.empty(3 * c.hidden_size, c.conv_size))
        self.rate_proj = nn.Linear(c.hidden_size, len(c.gates) * c.num_heads, bias=False)
        self.rate_bias = nn.Parameter(torch.empty(len(c.gates), c.num_heads))
        self.beta = nn.Parameter(torch.empty(c.num_heads)) if c.momentum and c.online else None
        self.share = nn.Parameter(torch.empty(c.depth, c.num_heads))
        hidden = c.depth - 1 if c.erase else 0
        self.hidden_erase = nn.Parameter(torch.empty(hidden, c.num_heads)) if hidden else None
        self.bank: MemoryBank
        if c.divergence == "kl":
            self.bank = SimplexBank(("memory",), c.num_heads, c.head_dim, c.expansion, c.activation)
        else:
            self.bank = MemoryBank(("memory",), (), c.num_heads, c.head_dim, c.depth, c.expansion, c.activation)
        self.norm = nn.Parameter(torch.ones(c.head_dim))
        free_of_weight_decay(self.conv, self.rate_bias, self.beta, self.share, self.hidden_erase)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Retentions from `retention_start`, other rates at mid-range, the convolution near identity."""
        c = self.config
        nn.init.zeros_(self.rate_bias)
        if c.use_retention:
            with torch.no_grad():
                self.rate_bias[c.gates.index("alpha")] = torch.linspace(*c.retention_start, c.num_heads)
        if self.beta is not None:
            nn.init.constant_(self.beta, logit(c.first_momentum))
        elif c.momentum:
            nn.init.constant_(self.rate_bias[c.gates.index("eta")], logit(c.first_momentum))
        nn.init.constant_(self.share, logit(c.share))
        if self.hidden_erase is not None:
            nn.init.constant_(self.hidden_erase, logit(c.hidden_erase_scale))
        draw_filters(self.conv)
        nn.init.ones_(self.norm)

    def first_state(self, x: Tensor) -> LongTermState:
        """The meta-learned memory, no surprise, an empty convolution tail, for the rows of `x`."""
        c, dtype = self.config, fast_dtype(x)
        conv = x.new_zeros(len(x), c.conv_size - 1, 3 * c.hidden_size, dtype=dtype)
        rates = conv.new_zeros(len(x), len(c.gates) * c.num_heads) if c.rates == "chunk" else None
        past = c.objective_window - 1
        window = conv.new_zeros(len(x), c.num_heads, past, 2 * c.head_dim + 1) if past else None
        return LongTermState(
            bank=self.bank(len(x), c.momentum, dtype),
            conv=conv,
            rates=rates,
            position=torch.zeros(len(x), dtype=torch.int64, device="cpu"),
            window=window,
        )

    def after(self, persistent: nn.Parameter, batch_size: int) -> LongTermState:
        """The state of rows whose memory has read the persistent tokens `[P, hidden]`, a chunk of their own."""
        tokens = aligned(persistent)[None]
        _, state = self(tokens, self.first_state(tokens), Aligned())
        return at_the_start(state, batch_size)

    def describe_memories(self) -> tuple[MemoryDescription, ...]:
        """The memory, and its momentum if it has one."""
        c, state = self.config, sum(w.numel() for w in self.bank.initial)
        objective, rule = describe_rule(c, c.use_retention, c.chunk_size)
        if c.divergence == "kl":
            rule = rule.replace("W", "log W")
        if c.objective_window > 1:
            objective = f"mean over {c.objective_window} tokens of {objective}"
        memory = MemoryDescription(
            name="memory",
            period=1 if c.read == "token" else c.chunk_size,
            objective=objective,
            rule=rule,
            state=state,
            initial=tuple(f"bank.initial.{i}" for i in range(len(self.bank.initial))),
        )
        if not c.momentum:
            return (memory,)
        goal, update = SURPRISE
        return memory, MemoryDescription(
            name="surprise", period=1, objective=goal, rule=update, state=state, feeds=("memory",)
        )

    def forward(
        self,
        x: Float[Tensor, "N L hidden"],
        state: LongTermState | Retrieval,
        rows: Aligned,
        kept: KeptMemories | None = None,
    ) -> tuple[Float[Tensor, "N L hidden"], LongTermState | Retrieval]:
        """The memory's answers to all tokens, and its state after the last.

        Args:
            x: left-aligned rows, at least one slot.
            state: before the first token. A `LongTermState` learns: every token is written, and its answer is
                norm(M_t(q_t)), as `rule.read` says. A `Retrieval` only answers, norm(M*(q_t)) (Titans Eq. 15, 21).
            rows: their lengths.
            kept: earlier memories that answer beside this one while it learns.
        """
        if isinstance(state, Retrieval):
            return self._retrieve(x, state, rows.lengths)
        return self._write(x, state, rows.lengths, kept)

    def _write(
        self, x: Tensor, state: LongTermState, lengths: Tensor | None, kept: KeptMemories | None
    ) -> tuple[Tensor, LongTermState]:
        streams, conv = short_conv(self.in_proj(x), self.conv, state.conv, lengths)
        logits = self.rate_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            logits = logits.to(state.conv.dtype)
            rates = state.rates
            if rates is not None:
                logits, rates = _hold_first(logits, rates, state.position, lengths, self.config.chunk_size)
            o, bank, window = self._learn(streams, logits, state, lengths, kept)
            y = merge_normalised(o, self.norm, self.config.norm_eps, x.dtype)
        after = state.position + (x.shape[1] if lengths is None else lengths)
        return y, LongTermState(bank, conv, rates, after, window)

    def _retrieve(self, x: Tensor, state: Retrieval, lengths: Tensor | None) -> tuple[Tensor, Retrieval]:
        width = self.config.hidden_size
        # Keys and values are products too many, but a product past the module would pass by what hangs on it.
        stream, tail = short_conv(self.in_proj(x)[..., :width], self.conv[:width], state.conv, lengths)
        with torch.autocast(x.device.type, enabled=False):
            q = safe_normalize(split_heads(F.silu(stream.to(tail.dtype)), self.config.head_dim))
            o = self.bank.read(state.weights, {"memory": q})["memory"]
            return merge_normalised(o, self.norm, self.config.norm_eps, x.dtype), Retrieval(state.weights, tail)

    def _learn(
        self, streams: Tensor, logits: Tensor, state: LongTermState, lengths: Tensor | None, kept: KeptMemories | None
    ) -> tuple[Tensor, BankState, Tensor | None]:
        """Answers `[N, H, L, V]`, the memories after all chunks, and the window's last tokens."""
        c, dtype = self.config, state.conv.dtype
        q, k, v = (split_heads(s, c.head_dim) for s in F.silu(streams.to(dtype)).split(c.hidden_size, -1))
        tokens = {"q": safe_normalize(q), "k": safe_normalize(k), "v": _limit_length(v)}
        heads = logits.unflatten(-1, (len(c.gates), -1)).permute(2, 0, 3, 1)
        # What the paper calls theta is eta to `chunk_rates`, and its eta is the momentum.
        gates = dict(zip(c.gates, heads, strict=True))
        bias = dict(zip(c.gates, self.rate_bias.to(dtype), strict=True))
        tokens["eta"] = gates["theta"]
        if c.use_retention:
            tokens["alpha"] = gates["alpha"]
        if self.beta is not None:
            tokens["log_b"] = F.logsigmoid(self.beta.to(dtype))[:, None].expand_as(tokens["eta"])
        elif c.momentum:
            tokens["log_b"] = F.logsigmoid(gates["eta"] + bias["eta"][:, None])
        hidden = None if self.hidden_erase is None else torch.sigmoid(self.hidden_erase.to(dtype))
        scales = Scales(bias["theta"], bias.get("alpha"), torch.sigmoid(self.share.to(dtype)), hidden)
        rule = rate_rule(c, c.max_erase, c.chunk_size)
        grid = Grid.of(state.position, lengths, streams.shape[1], c.chunk_size)
        window = tail = None
        if state.window is not None:
            importance = F.logsigmoid(gates["gamma"] + bias["gamma"][:, None])
            known = (tokens["k"], tokens["v"], importance)
            window, tail = TokenWindow.of(state.window, *known, state.position, lengths, grid)
        inside = kept is not None and kept.mixes_layers
        if kept is not None and inside:
            tokens["shares"] = kept.shares

        def plain(
            tokens: dict[str, Tensor], scales: Scales, base: list[Tensor] | None, bank: BankState
        ) -> tuple[Tensor, BankState]:
            def run(span: Span, part: dict[str, Tensor], bank: BankState, grid: Grid) -> tuple[Tensor, BankState]:
                valid = grid.valid_slots(*span, part["k"].device)
                gates = Gates(part["eta"], part.get("alpha"), part.get("log_b"), valid)
                mix = replace(kept, shares=part["shares"]).mix if kept is not None and inside else None
                rates = chunk_rates(rule, gates, scales)
                if c.ascend:
                    rates = replace(rates, inner_lr=[-lr for lr in rates.inner_lr])
                if window is None:
                    y, bank = self._chunk(part, rates, bank, mix)
                else:
                    y, bank = learn_window(c, self.bank, bank, window.part(span), rates, part["q"], mix)
                return y, grid.cross(bank, span[1], c.chunk_size)

            return scan_chunks(tokens, grid, c.chunk_size, bank, run)

        if c.ascend or c.inner_steps > 1 or inside or window is not None or c.divergence == "kl":
            o, bank = plain(tokens, scales, None, state.bank)
        else:
            loop = BankLoop(c, rule, self.bank, c.chunk_size, self_targets=False)
            o, bank = loop.run(plain, tokens, scales, None, state.bank, grid)
        return (o if kept is None or inside else kept.combine(tokens["q"], o, c.activation)), bank, tail

    def _chunk(
        self, tokens: dict[str, Tensor], rates: Rates, bank: BankState, mix: Mix | None
    ) -> tuple[Tensor, BankState]:
        """Answers of one chunk and the memories after it, their chunk's start unchanged."""
        c, k, v = self.config, tokens["k"], tokens["v"]
        for _ in range(1, c.inner_steps):
            _, bank = learn_chunk(c, self.bank, bank, k, v, rates, None, self_targets=False)
            bank = BankState(bank.running, bank.running, bank.surprise)
            keep = torch.zeros_like(rates.decay.log_retention)
            rates = replace(rates, decay=replace(rates.decay, log_retention=keep))
        y, bank = learn_chunk(c, self.bank, bank, k, v, rates, tokens["q"], self_targets=False, mix=mix)
        assert y is not None
        return y, bank


def at_the_start(state: LongTermState, batch_size: int) -> LongTermState:
    """The state of every row from that of one which has read the persistent tokens, a chunk of their own."""
    state = state.map(lambda t: t.expand(batch_size, *t.shape[1:]))
    bank = BankState(list(state.bank.running), state.bank.running, state.bank.surprise)
    position = torch.zeros(batch_size, dtype=torch.int64, device="cpu")
    return LongTermState(bank, state.conv, state.rates, position, state.window)


def aligned(tokens: Tensor) -> Tensor:
    """A copy: parameters read from a file may lie at odd addresses, where matrix products round differently."""
    return tokens.clone()


def _limit_length(v: Tensor) -> Tensor:
    """v, with a root mean square above 1 scaled down to 1."""
    v = v.clamp(-_BOUND, _BOUND)
    return v * v.square().mean(-1, keepdim=True).clamp_min(1.0).rsqrt()


def _hold_first(
    logits: Tensor, held: Tensor, position: Tensor, lengths: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Every token's logits replaced by those of its chunk's first token, which an earlier call may have read.

    Args:
        logits: `[N, L, R]` of the call's tokens.
        held: `[N, R]` of the chunk that the first token continues.
        position: tokens read before.
        lengths: of the rows; None for all of L.
        chunk: tokens in a chunk.

    Returns:
        The logits, and those of the chunk of each row's last token.
    """
    time = logits.shape[1]
    slot = torch.arange(time, device="cpu")
    first = slot - (position[:, None] + slot) % chunk
    # Slot 0 of `known` is the chunk that began before this call.
    known = torch.cat([held[:, None], logits], dim=1)
    index = (first + 1).clamp_min(0).to(logits.device)[..., None].expand(-1, -1, logits.shape[2])
    logits = known.gather(1, index)
    if lengths is None:
        return logits, logits[:, -1]
    last = lengths.to(logits.device)[:, None, None].expand(-1, 1, logits.shape[2])
    return logits, torch.cat([held[:, None], logits], dim=1).gather(1, last)[:, 0]
