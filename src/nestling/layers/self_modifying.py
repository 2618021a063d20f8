"""Self-modifying Titans (NL section 8.1-8.2, Eq. 83-97)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.layers.bank_loop import BankLoop, Base, Plain
from nestling.layers.cacheable import CacheableLayer
from nestling.layers.chunks import Span, learn_chunk, run_checkpointed, scan_chunks
from nestling.layers.heads import draw_filters, fast_dtype, free_of_weight_decay, logit, merge_normalised, split_heads
from nestling.layers.rates import Gates, Scales, chunk_rates
from nestling.layers.self_modifying_config import ADAPTIVE, DEEP, GATES, SelfModifyingConfig
from nestling.memory.bank import BankState, MemoryBank
from nestling.memory.description import SURPRISE, MemoryDescription, describe_rule
from nestling.memory.grid import Grid
from nestling.memory.kept import KeptMemories
from nestling.memory.state import State
from nestling.ops.normalize import safe_normalize
from nestling.ops.short_conv import short_conv

__all__ = ["ADAPTIVE", "SelfModifyingConfig", "SelfModifyingState", "SelfModifyingTitans"]


LENGTH_SPEED = 4.0
"""A value's length is the exponential of a parameter times this: what it has to be differs by factors between tasks."""


@dataclass
class SelfModifyingState(State):
    """State of `SelfModifyingTitans`.

    Attributes:
        main: the bank of M_memory (with all other adaptive memories when the chunk sizes agree).
        own: the bank of the other adaptive memories when they have a chunk of their own.
        conv: the last `conv_size - 1` inputs of the convolution.
        position: tokens read so far, `[N]` int64 on the CPU.
    """

    main: BankState
    own: BankState | None
    conv: Tensor
    position: Tensor


class SelfModifyingTitans(CacheableLayer):
    """Memories that generate their keys, values, rates and targets, and learn all of them in context.

    For the weights at the start of a chunk (NL Eq. 90) and inputs u = silu(conv(x W_u)), normalised per head, one for
    all memories or with `own_streams` one each for k, v, q and the rates:

        k_t = M_k(u_t), v_t = M_v(u_t), eta_t = M_eta(u_t), alpha_t = M_alpha(u_t); q_t = silu(conv(x W_q)) or M_q(u_t)
        target of every memory m: M_m(v_t);  write (k_t, M_m(v_t)) by the rule;  o_t = M_memory,t(q_t)

    with k, v and q of length 1; with `value_length` M_memory's target is that many times as long. With `anchored` the
    memories are W_0 + F, and the rule moves F. From a_t = sigmoid(alpha_t + bias)^(1/16) and sigma_t =
    sigmoid(eta_t + bias), `rates.chunk_rates` makes e_t and l_t, which stay in their stable range whatever the memories
    say. An MLP's layers before the last use a learnable share of e_t.

    Examples:
        >>> import torch
        >>> from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
        >>> layer = SelfModifyingTitans(SelfModifyingConfig(hidden_size=32, num_heads=2, memory="mlp", momentum=True))
        >>> y, state = layer(torch.randn(2, 70, 32))
        >>> y, state = layer(torch.randn(2, 5, 32), state)  # as if the 75 tokens had come at once
        >>> y.shape
        torch.Size([2, 5, 32])
    """

    def __init__(self, config: SelfModifyingConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.head_dim = c.hidden_size // c.num_heads
        self.fixed_q = "q" not in c.adapt
        deep = DEEP[:3] if self.fixed_q else DEEP
        gates = GATES if c.use_retention else GATES[:1]
        split = c.outer_chunk != c.chunk_size
        adaptive = [n for n in deep + gates if n in c.adapt]
        self.main = self._bank([n for n in adaptive if n == "memory" or not split])
        self.own = self._bank([n for n in adaptive if n != "memory"]) if split and len(adaptive) > 1 else None
        fixed = [n for n in deep + gates if n not in c.adapt]
        self.fixed = self._bank(fixed, anchored=False) if fixed else None

        # In the order in which the projection has them.
        self.streams: tuple[str, ...] = ("q", "k", "v", "gates")
        if not c.own_streams:
            self.streams = ("all", "q") if self.fixed_q else ("all",)
        self.in_proj = nn.Linear(c.hidden_size, len(self.streams) * c.hidden_size, bias=False)
        self.conv = nn.Parameter(torch.empty(len(self.streams) * c.hidden_size, c.conv_size))
        self.momentum_proj = nn.Linear(c.hidden_size, c.num_heads) if c.momentum else None
        biased = c.gate_bias is not None
        self.gate_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=biased) if c.output_gate else None
        self.out_norm = nn.Parameter(torch.ones(self.head_dim))
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.eta_bias = nn.Parameter(torch.empty(c.num_heads))
        self.alpha_bias = nn.Parameter(torch.empty(c.num_heads)) if c.use_retention else None
        self.share = nn.Parameter(torch.empty(c.layers, c.num_heads))
        hidden = c.layers - 1 if c.erase else 0
        self.hidden_erase = nn.Parameter(torch.empty(hidden, c.num_heads)) if hidden else None
        self.others = nn.Parameter(torch.empty(c.num_heads)) if c.others_scale is not None else None
        self.gain = nn.Parameter(torch.empty(c.num_heads)) if c.generation_gain is not None else None
        self.length = nn.Parameter(torch.empty(c.num_heads)) if c.value_length is not None else None
        free_of_weight_decay(self.share, self.hidden_erase, self.others, self.gain, self.length, self.conv)
        self.reset_parameters()

    def _bank(self, names: list[str], anchored: bool | None = None) -> MemoryBank:
        c = self.config
        deep, gates = (tuple(n for n in names if n in group) for group in (DEEP, GATES))
        return MemoryBank(
            deep,
            gates,
            c.num_heads,
            self.head_dim,
            c.layers,
            c.expansion,
            c.activation,
            c.gate_scale,
            c.anchored if anchored is None else anchored,
            c.identity,
        )

    def reset_parameters(self) -> None:
        """Retentions from `retention_start`, rates from `eta_start`, the convolution near identity."""
        c = self.config
        nn.init.constant_(self.eta_bias, c.eta_start)
        if self.alpha_bias is not None:
            with torch.no_grad():
                self.alpha_bias.copy_(torch.linspace(*c.retention_start, c.num_heads))
        with torch.no_grad():
            for layer, share in enumerate(c.shares):
                self.share[layer] = logit(share)
        if self.hidden_erase is not None:
            nn.init.constant_(self.hidden_erase, logit(c.hidden_erase_scale))
        if self.others is not None and c.others_scale is not None:
            nn.init.constant_(self.others, logit(c.others_scale))
        if self.gain is not None and c.generation_gain is not None:
            nn.init.constant_(self.gain, c.generation_gain)
        if self.length is not None and c.value_length is not None:
            nn.init.constant_(self.length, math.log(c.value_length) / LENGTH_SPEED)
        if self.gate_proj is not None and c.gate_bias is not None:
            with torch.no_grad():
                self.gate_proj.weight *= 0.1
                self.gate_proj.bias.fill_(c.gate_bias)
        draw_filters(self.conv)
        if self.momentum_proj is not None:
            # sigmoid(0) = 0.5: a surprise that fades over a few tokens.
            nn.init.zeros_(self.momentum_proj.bias)

    def first_state(self, x: Tensor) -> SelfModifyingState:
        """The meta-learned fast weights, no surprise, an empty convolution tail."""
        c, dtype = self.config, fast_dtype(x)
        return SelfModifyingState(
            main=self.main(len(x), c.momentum, dtype),
            own=None if self.own is None else self.own(len(x), c.momentum, dtype),
            conv=x.new_zeros(len(x), c.conv_size - 1, len(self.conv), dtype=dtype),
            position=torch.zeros(len(x), dtype=torch.long, device="cpu"),
        )

    def describe_memories(self) -> tuple[MemoryDescription, ...]:
        """M_memory; the memories that make its keys, values and rates, which are read at chunk starts; the momentum."""
        c = self.config
        deep = sum(w.numel() // (w.shape[1] if i else 1) for i, w in enumerate(self.main.initial) if i)
        deep += c.num_heads * self.main.hidden * self.head_dim
        total = sum(w.numel() for bank in (self.main, self.own) if bank is not None for w in bank.initial)
        others = tuple(n for n in c.adapt if n != "memory" and (n != "alpha" or c.use_retention))
        objective, rule = describe_rule(c, c.use_retention, c.chunk_size)
        found = [
            MemoryDescription(
                name="memory",
                period=1 if c.read == "token" else c.chunk_size,
                objective=objective,
                rule=rule,
                state=deep,
                initial=tuple(n for n, _ in self.named_parameters() if n.startswith("main.initial")),
            )
        ]
        if others:
            objective, rule = describe_rule(c, c.use_retention, c.outer_chunk)
            own = "main" if self.own is None else "own"
            found.append(
                MemoryDescription(
                    name=", ".join(others),
                    period=c.outer_chunk,
                    objective=objective,
                    rule=rule,
                    state=total - deep,
                    initial=tuple(n for n, _ in self.named_parameters() if n.startswith(f"{own}.initial")),
                    generates=("memory",),
                )
            )
        if c.momentum:
            goal, update = SURPRISE
            fed = tuple(memory.name for memory in found)
            found.append(
                MemoryDescription(name="surprise", period=1, objective=goal, rule=update, state=total, feeds=fed)
            )
        return tuple(found)

    def memory_of(self, state: State) -> list[Float[Tensor, "N H outputs inputs"]]:
        """See `CacheableLayer.memory_of`: M_memory, whole."""
        main = _own(state).main
        # Others than M_memory may add less than their F; they are not kept.
        return self.main.first_deep(self.main.whole(main.running, self.main.base(main.running[0].dtype), None))

    def restart(self, state: State, fresh: State) -> SelfModifyingState:
        """See `CacheableLayer.restart`: all memories begin again, and a chunk."""
        return replace(_own(fresh), conv=_own(state).conv)

    def run_with_kept(
        self, x: Float[Tensor, "N L hidden"], state: State, lengths: Tensor | None, kept: KeptMemories | None
    ) -> tuple[Float[Tensor, "N L hidden"], SelfModifyingState]:
        """See `CacheableLayer.run_with_kept`."""
        if kept is not None:  # whose shares are of all tokens of the call
            return self._run(x, _own(state), lengths, kept)
        stride = self.config.checkpoint_chunks
        return run_checkpointed(self._run, x, _own(state), lengths, stride and stride * self.config.outer_chunk)

    def _run(
        self, x: Tensor, state: SelfModifyingState, lengths: Tensor | None, kept: KeptMemories | None = None
    ) -> tuple[Tensor, SelfModifyingState]:
        streams, conv = short_conv(self.in_proj(x), self.conv, state.conv, lengths)
        b = None if self.momentum_proj is None else self.momentum_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            o, main, own = self._memories(streams, b, state, lengths, kept)
        after = state.position + (x.shape[1] if lengths is None else lengths)
        gate = None if self.gate_proj is None else F.silu(self.gate_proj(x))
        y = self._output(o, x.dtype, gate)
        return y, SelfModifyingState(main, own, conv, after)

    def _output(self, o: Tensor, dtype: torch.dtype, gate: Tensor | None) -> Tensor:
        o = merge_normalised(o, self.out_norm, self.config.norm_eps, dtype)
        return self.out_proj(o if gate is None else o * gate)

    def _memories(
        self,
        streams: Tensor,
        b: Tensor | None,
        state: SelfModifyingState,
        lengths: Tensor | None,
        kept: KeptMemories | None,
    ) -> tuple[Tensor, BankState, BankState | None]:
        """All chunks: outputs `[N, H, L, V]` and the banks' new states."""
        c, dtype = self.config, state.conv.dtype
        tokens = self._tokens(streams.to(dtype))
        if b is not None:
            tokens["log_b"] = F.logsigmoid(b.to(dtype)).transpose(1, 2)
        scales, time = self._scales(dtype), streams.shape[1]
        own: BankState | None = None
        if self.own is not None and state.own is not None:
            # Nothing that these memories make or learn depends on M_memory, so they go ahead of it.
            grid = Grid.of(state.position, lengths, time, c.outer_chunk)
            inputs = {n: t for n, t in tokens.items() if n != "q"}
            made, own = self._learn(self.own, inputs, scales, state.own, grid, None)
            widths = [self.head_dim] * len(self.own.deep) + [1] * len(self.own.gates)
            parts = zip(self.own.deep + self.own.gates, made.split(widths, -1), strict=True)
            tokens = {n: t for n, t in tokens.items() if not n.startswith("u_")}
            tokens |= {n: t[..., 0] if n in GATES else t for n, t in parts}
        inside = kept if kept is not None and kept.mixes_layers else None
        if inside is not None:
            tokens["shares"] = inside.shares
        grid = Grid.of(state.position, lengths, time, c.chunk_size)
        o, main = self._learn(self.main, tokens, scales, state.main, grid, inside)
        if kept is not None and inside is None:
            o = kept.combine(tokens["q"], o, c.activation)
        return o, main, own

    def _tokens(self, streams: Tensor) -> dict[str, Tensor]:
        """Inputs `[N, H, L, K]` of the adaptive memories, "u_" and their role, and what fixed ones make of theirs."""
        parts = [
            safe_normalize(split_heads(s, self.head_dim)) for s in F.silu(streams).split(self.config.hidden_size, -1)
        ]
        given = dict(zip(self.streams, parts, strict=True))
        inputs = {role: given.get(role, given.get("all", parts[0])) for role in ("k", "v", "q", "gates")}
        tokens = {"q": inputs["q"]} if self.fixed_q else {}
        for bank in (self.main, self.own):
            if bank is not None:
                tokens |= {f"u_{role}": inputs[role] for role in roles(bank)}
        if self.fixed is not None:
            weights = self.fixed(len(streams), False, streams.dtype).start
            tokens |= self.fixed.read(weights, {role: inputs[role] for role in roles(self.fixed)}, unit=True)
        return tokens

    def _scales(self, dtype: torch.dtype) -> Scales:
        """What the rates learn across sequences, the same in all chunks."""
        alpha = None if self.alpha_bias is None else self.alpha_bias.to(dtype)
        hidden = None if self.hidden_erase is None else torch.sigmoid(self.hidden_erase.to(dtype))
        others = None if self.others is None else torch.sigmoid(self.others.to(dtype))
        gain = None if self.gain is None else self.gain.to(dtype)
        length = None if self.length is None else torch.exp(LENGTH_SPEED * self.length.to(dtype))
        share = torch.sigmoid(self.share.to(dtype))
        return Scales(self.eta_bias.to(dtype), alpha, share, hidden, others, gain, length)

    def _learn(
        self,
        bank: MemoryBank,
        tokens: dict[str, Tensor],
        scales: Scales,
        state: BankState,
        grid: Grid,
        kept: KeptMemories | None,
    ) -> tuple[Tensor, BankState]:
        """Answers of M_memory, or side by side what a bank without it makes; and the bank after all chunks."""
        c, base = self.config, bank.base(state.start[0].dtype)
        chunk = c.chunk_size if bank is self.main else c.outer_chunk
        plain = self._chunks(bank, chunk, grid, kept)
        if c.compile_chunks or kept is not None:
            return plain(tokens, scales, base, state)
        loop = BankLoop(c, c.rates, bank, chunk, c.self_targets)
        return loop.run(plain, tokens, scales, base, state, grid)

    def _chunks(self, bank: MemoryBank, chunk: int, grid: Grid, kept: KeptMemories | None) -> Plain:
        """`_learn`, chunk after chunk."""
        generate, step = SelfModifyingTitans._generate, SelfModifyingTitans._step
        if self.config.compile_chunks:
            generate, step = _compiled_generate, _compiled_step

        def plain(tokens: dict[str, Tensor], scales: Scales, base: Base, state: BankState) -> tuple[Tensor, BankState]:
            def run(span: Span, tokens: dict[str, Tensor], state: BankState, grid: Grid) -> tuple[Tensor, BankState]:
                tokens = generate(self, bank, tokens, scales, base, state)
                y, state = step(self, bank, state, tokens, scales, base, *span, grid, kept)
                if y is None:
                    y = torch.cat([*(tokens[n] for n in bank.deep), *(tokens[n][..., None] for n in bank.gates)], -1)
                return y, grid.cross(state, span[1], chunk)

            return scan_chunks(tokens, grid, chunk, state, run)

        return plain

    def _generate(
        self, bank: MemoryBank, tokens: dict[str, Tensor], scales: Scales, base: Base, state: BankState
    ) -> dict[str, Tensor]:
        """What the memories of a bank make for a chunk, from the weights at its start (NL Eq. 86, 90), and the rest."""
        made = {n: t for n, t in tokens.items() if not n.startswith("u_")}
        if roles(bank):
            inputs = {role: tokens[f"u_{role}"] for role in roles(bank)}
            made |= bank.read(bank.whole(state.start, base, scales.gain), inputs, unit=True)
        return made

    def _step(
        self,
        bank: MemoryBank,
        state: BankState,
        tokens: dict[str, Tensor],
        scales: Scales,
        base: Base,
        start: int,
        end: int,
        grid: Grid,
        kept: KeptMemories | None,
    ) -> tuple[Tensor | None, BankState]:
        """One chunk of one bank: targets, gradients, write; the main bank also answers the queries."""
        c = self.config
        valid = grid.valid_slots(start, end, tokens["k"].device)
        gates = Gates(tokens["eta"], tokens.get("alpha"), tokens.get("log_b"), valid)
        rates = chunk_rates(c.rates, gates, scales)
        q, length = (tokens["q"], scales.value_length) if bank is self.main else (None, None)
        if bank is not self.main and rates.others is not None:
            # A bank without M_memory takes the share whole.
            rates = rates.shared()
        mix = None if kept is None else replace(kept, shares=tokens["shares"]).mix
        return learn_chunk(
            c, bank, state, tokens["k"], tokens["v"], rates, q, c.self_targets, base, scales.gain, length, mix
        )


def _own(state: State) -> SelfModifyingState:
    if not isinstance(state, SelfModifyingState):
        raise TypeError(
            f"self-modifying Titans continue from a SelfModifyingState, not from the state {type(state).__name__}"
        )
    return state


def roles(bank: MemoryBank) -> tuple[str, ...]:
    """What the memories of a bank make: of "k", "v", "q", and "gates" for the rates."""
    return tuple(n for n in bank.deep if n != "memory") + (("gates",) if bank.gates else ())


# Functions of the class: all layers of a model share one compilation, and nothing is compiled before the first call.
_compiled_generate = torch.compile(SelfModifyingTitans._generate, dynamic=False)
_compiled_step = torch.compile(SelfModifyingTitans._step, dynamic=False)
