"""Settings of the neural long-term memory of Titans."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nestling.layers.heads import NEW_FIELD
from nestling.memory.rule import Rule


@dataclass(frozen=True, kw_only=True)
class NeuralMemoryConfig(Rule):
    """Settings of `NeuralMemory`; those of the learning rule are `Rule`'s, with Titans' defaults.

    Attributes:
        hidden_size: width of the layer's input and output.
        num_heads: H; every head has one memory of width `hidden_size / num_heads`.
        depth: L_M, layers of a memory, 1 to 4 (Titans section 5.5 compares these). 1 is a matrix without residual.
        expansion: hidden width of a memory over its head width.
        activation: of a memory's hidden layers.
        erase: the delta projection (I - e k k^T) beside the gradient step. Titans has none.
        momentum: the surprise S_t (Titans Eq. 10).
        use_retention: the forgetting of Titans Eq. 13; without it a_t = 1.
        rates: "token" makes alpha_t, eta_t and theta_t functions of every token, as the paper's experiments do; "chunk"
            holds those of a chunk's first token for the whole chunk (section 3.2 makes them functions of the chunk; a
            function of all of its tokens would let a token see later ones).
        chunk_size: tokens whose gradients are taken at the same memory; b in Titans Eq. 16.
        max_erase: upper end of (e_t + folded l_t) / a_t with an erase or online gradients.
        inner_lr_scale: first value of the learnable share of the largest stable step, in (0, 1); None is 0.5 for depth
            1 and 0.1 beyond, where hidden layers see an effective step of |W|^2 times the rate.
        hidden_erase_scale: first value of the learnable share of e_t that layers before the last use, in (0, 1).
        conv_size: width of the causal convolutions behind the query, key and value projections (section 4.4); 1 is
            none. The paper gives no width; 4 is the usual one.
        output_gate: multiply the normalised output by silu(x W_g) (section 4.4). The combinations with attention have
            gates of their own and ignore it, except memory as a layer.
        inner_steps: gradient steps a token takes, each at the memory the one before left; retention acts in the first.
            More than 1 needs `chunk_size` 1: a second step of a whole chunk would show its tokens later ones.
        ascend: step along the gradient in place of against it, to see what of a result is owed to learning at all.
        checkpoint_chunks: recompute the layer over this many chunks at a time in the backward pass; None keeps all
            activations.
        norm_eps: of the output norm.
        persistent_tokens: N_p, learnable tokens that the memory reads before every document (section 3.3; Table 5
            removes them from the LMM), a chunk of their own.
        first_momentum: first value of the momentum, in (0, 1).
        retention_start: logits of the retentions at the start, of the first head and of the last, with the others
            evenly between: a = sigmoid(logit)^(1/16). (0, 6) is 0.958 to 0.9998, of which the first keeps a twentieth
            over 70 tokens.
        gate_bias: first bias of the output gate, whose weights then start at a tenth: above 0 the gate starts open.
            None has no bias, so that the gate multiplies by random signs until it is trained.
        objective_window: c, tokens in a token's inner objective, itself and the last c - 1 (the Omega rule, NL Eq. 68).
            Their gradients, all at the chunk's start, are averaged with weights gamma_i, a gate of token i.
        divergence: what holds new weights to the old ones (Miras' retention gate). "l2" is the rule as it stands; "kl",
            the Kullback-Leibler divergence, keeps every row of weights on a simplex (Memora) and runs the rule on their
            logarithms. It needs depth 2, and its reads cost as much as writing every token's weights out.

    Raises:
        ValueError: sizes that do not divide, or a rule that has no closed form.
    """

    hidden_size: int
    num_heads: int
    depth: int = 2
    expansion: int = 1
    activation: Literal["silu", "gelu", "relu"] = "silu"
    erase: bool = False
    momentum: bool = True
    use_retention: bool = True
    rates: Literal["token", "chunk"] = "token"
    chunk_size: int = 64
    max_erase: float = 1.0
    inner_lr_scale: float | None = None
    hidden_erase_scale: float = 0.1
    conv_size: int = 4
    output_gate: bool = True
    inner_steps: int = 1
    ascend: bool = False
    checkpoint_chunks: int | None = None
    norm_eps: float = 1e-6
    persistent_tokens: int = field(default=0, metadata=NEW_FIELD)
    first_momentum: float = field(default=0.5, metadata=NEW_FIELD)
    retention_start: tuple[float, float] = field(default=(0.0, 6.0), metadata=NEW_FIELD)
    gate_bias: float | None = field(default=None, metadata=NEW_FIELD)
    objective_window: int = field(default=1, metadata=NEW_FIELD)
    divergence: Literal["l2", "kl"] = field(default="l2", metadata=NEW_FIELD)

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("hidden_size", "num_heads", "expansion", "chunk_size", "conv_size", "inner_steps", "checkpoint_chunks")
        for name in (*sizes, "objective_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if not 1 <= self.depth <= 4:
            raise ValueError(f"depth is 1, 2, 3 or 4, not {self.depth}")
        if self.activation not in ("silu", "gelu", "relu"):
            raise ValueError(f"activation is 'silu', 'gelu' or 'relu', not {self.activation!r}")
        if self.rates not in ("token", "chunk"):
            raise ValueError(f"rates is 'token' or 'chunk', not {self.rates!r}")
        if self.inner_steps > 1 and self.chunk_size > 1:
            raise ValueError(
                f"inner_steps={self.inner_steps} needs chunk_size=1, not {self.chunk_size}: the second step of a chunk "
                "would show its tokens what comes after them"
            )
        if self.inner_steps > 1 and self.read_before:
            raise ValueError("read_before reads the memory before a token's only step; it has no meaning with more")
        if self.ascend and (self.erase or self.gradient == "online" or not self.use_retention):
            raise ValueError(
                "ascend needs chunk gradients, no erase, and retention: the step is folded into the erase otherwise, "
                "and a memory that climbs its loss and forgets nothing grows without end"
            )
        if self.objective_window > 1 and (self.erase or self.gradient == "online" or self.inner_steps > 1):
            raise ValueError(
                f"objective_window={self.objective_window} needs chunk gradients, no erase and one inner step: "
                "gradients at the weights of the token before would make every token of the window an erase of its own"
            )
        if self.divergence not in ("l2", "kl"):
            raise ValueError(f"divergence is 'l2' or 'kl', not {self.divergence!r}")
        if self.divergence == "kl" and (
            self.depth != 2 or self.erase or self.gradient == "online" or self.read_before or self.objective_window > 1
        ):
            raise ValueError(
                "divergence='kl' needs depth 2, chunk gradients, reads after the write, no erase and no window: what "
                "is erased or recalled is not linear in the logarithms of the weights"
            )
        if not 0 < self.max_erase <= 2:
            raise ValueError(f"max_erase is in (0, 2], not {self.max_erase}: beyond 2 the erase is no contraction")
        object.__setattr__(self, "retention_start", tuple(self.retention_start))
        if len(self.retention_start) != 2:
            raise ValueError(f"retention_start is two logits, first head and last, not {self.retention_start}")
        if self.persistent_tokens < 0:
            raise ValueError(f"persistent_tokens must be at least 0, not {self.persistent_tokens}")
        shares = {"inner_lr_scale": self.share, "hidden_erase_scale": self.hidden_erase_scale}
        shares |= {"first_momentum": self.first_momentum}
        for name, share in shares.items():
            if not 0 < share < 1:
                raise ValueError(f"{name} is in (0, 1), not {share}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def share(self) -> float:
        """First value of the share of the largest stable step."""
        if self.inner_lr_scale is not None:
            return self.inner_lr_scale
        return 0.5 if self.depth == 1 else 0.1

    @property
    def gates(self) -> tuple[str, ...]:
        """The rates a token gives, in the order of `LongTermMemory.rate_proj`'s outputs."""
        own = self.momentum and not self.online
        there = {"alpha": self.use_retention, "eta": own, "gamma": self.objective_window > 1}
        return ("theta", *(name for name, given in there.items() if given))


@dataclass(frozen=True, kw_only=True)
class MemoryAsContextConfig(NeuralMemoryConfig):
    """Settings of `MemoryAsContext`.

    Attributes:
        segment_size: C, tokens in a segment (Titans section 4.1). `chunk_size` must divide it; the paper's write takes
            the gradients of a whole segment at once, which is `chunk_size` = `segment_size`.
        persistent_tokens: N_p, learnable tokens at the start of every segment's attention.
        rope_theta: base of the rotary frequencies.

    Raises:
        ValueError: as `NeuralMemoryConfig`, and a segment that is no multiple of the chunk.
    """

    chunk_size: int = 64
    segment_size: int = 64
    persistent_tokens: int = 4
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_attention(self.hidden_size, self.num_heads, self.persistent_tokens)
        if self.segment_size < 1 or self.segment_size % self.chunk_size:
            raise ValueError(
                f"segment_size {self.segment_size} is not a multiple of chunk_size {self.chunk_size}: a segment's "
                "attention reads the memory at the segment's start, which must be a chunk's start"
            )


@dataclass(frozen=True, kw_only=True)
class WindowedMemoryConfig(NeuralMemoryConfig):
    """What `MemoryAsGate` and `MemoryAsLayer` share.

    Attributes:
        window: tokens in view of the attention, the token itself included; persistent tokens come on top.
        persistent_tokens: N_p, learnable tokens before the document: the memory reads them first, and the attention
            always sees them.
        rope_theta: base of the rotary frequencies.

    Raises:
        ValueError: as `NeuralMemoryConfig`, and a window below 1.
    """

    window: int = 64
    persistent_tokens: int = 4
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_attention(self.hidden_size, self.num_heads, self.persistent_tokens)
        if self.window < 1:
            raise ValueError(f"window must be at least 1 token; got {self.window}")


@dataclass(frozen=True, kw_only=True)
class MemoryAsGateConfig(WindowedMemoryConfig):
    """Settings of `MemoryAsGate`: those of `WindowedMemoryConfig`."""


@dataclass(frozen=True, kw_only=True)
class MemoryAsLayerConfig(WindowedMemoryConfig):
    """Settings of `MemoryAsLayer`: those of `WindowedMemoryConfig`."""


def check_attention(hidden_size: int, num_heads: int, persistent_tokens: int) -> None:
    """Refuse what the attention beside a memory cannot use."""
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"hidden_size {hidden_size} must be an even multiple of num_heads {num_heads}: rotary positions turn pairs "
            "of channels of a head"
        )
    if persistent_tokens < 1:
        raise ValueError(f"persistent_tokens must be at least 1 (Titans section 3.3), not {persistent_tokens}")
