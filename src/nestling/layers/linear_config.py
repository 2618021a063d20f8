"""Settings of linear memories."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nestling.layers.heads import NEW_FIELD
from nestling.layers.scalar_retention import KERNELS, Kernel

CHOICES = {
    "feature_map": ("identity", "elu", "silu"),
    "positions": ("none", "rope"),
    "retention": ("none", "fixed", "data", "channel"),
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
            exp(-exp(A_log) softplus(W_a x + dt_bias)) (Gated DeltaNet, after Mamba-2); "channel" is the same with a
            number for every channel of the key (Kimi Delta Attention).
        erase: the delta rule: what the memory recalls at a key is taken away before the value is written.
        allow_neg_eigval: beta in (0, 2) in place of (0, 1), which state tracking needs (Grazzi et al. 2024,
            arXiv:2411.12537).
        writes_per_token: writes, each with a key, a value and a beta of its own, before the token reads; the memory is
            retained before the first alone (Gated DeltaProduct's n_h).
        state_feedback: erase with b beta_t in place of beta_t, b in (0, 1) learned by head, and by what the memory
            holds before it is retained (Comba): the factor of W is a_t - b beta_t k k^T.
        output_feedback: read with q - d k, d learned by head (Comba); the first value of d, or None for none.
        conv_size: width of the causal convolution over q, k and v; 1 is none.
        output_gate: multiply the normalised output by silu or sigmoid of a projection of x.
        gate_rank: rank of the projections that give the logits of the output gate (with a bias) and of the retention
            by channel; None is full (Kimi Delta Attention takes the width of a head).
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
    retention: Literal["none", "fixed", "data", "channel"] = "data"
    erase: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    output_gate: Literal["none", "silu", "sigmoid"] = "silu"
    output_norm: Literal["none", "rms", "group"] = "rms"
    chunk_size: int = 64
    norm_eps: float = 1e-6
    kernel: Kernel = "nestling"
    initial: bool = field(default=False, metadata=NEW_FIELD)
    writes_per_token: int = field(default=1, metadata=NEW_FIELD)
    state_feedback: bool = field(default=False, metadata=NEW_FIELD)
    output_feedback: float | None = field(default=None, metadata=NEW_FIELD)
    gate_rank: int | None = field(default=None, metadata=NEW_FIELD)

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_heads", "key_dim", "value_expansion", "conv_size", "chunk_size")
        for name in (*sizes, "writes_per_token", "gate_rank"):
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
        if self.denominator and self.output_feedback is not None:
            raise ValueError(
                "output_feedback takes d k from the query, and denominator=True needs every (q.k) positive"
            )
        if self.state_feedback and not self.erase:
            raise ValueError("state_feedback=True scales the erase; it needs erase=True")
        if self.state_feedback and self.allow_neg_eigval:
            raise ValueError(
                "state_feedback=True makes the factor along a key a - b beta, which beta up to 2 takes below -1; leave "
                "allow_neg_eigval off"
            )
        if self.gate_rank is not None and self.output_gate == "none" and self.retention != "channel":
            raise ValueError("gate_rank is of the output gate and of a retention by channel, and there is neither")
        if self.kernel == "fla" and (self.retention == "channel" or self.state_feedback):
            raise ValueError(
                "kernel='fla' has neither a retention by channel nor an erase that differs from the write; set "
                "kernel='nestling'"
            )

    @property
    def key_width(self) -> int:
        """K."""
        return self.hidden_size // self.num_heads if self.key_dim is None else self.key_dim

    @property
    def value_width(self) -> int:
        """V."""
        return self.key_width * self.value_expansion
