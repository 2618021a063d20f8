"""Settings of self-modifying Titans."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nestling.layers.heads import NEW_FIELD
from nestling.layers.rates import rate_rule
from nestling.memory.rule import Rule
from nestling.ops.native import RateRule

DEEP = ("memory", "k", "v", "q")
GATES = ("eta", "alpha")
ADAPTIVE = ("memory", "k", "v", "eta", "alpha")


@dataclass(frozen=True, kw_only=True)
class SelfModifyingConfig(Rule):
    """Settings of `SelfModifyingTitans`; those of the learning rule are `Rule`'s.

    Attributes:
        hidden_size: width of the layer's input and output.
        num_heads: H; every head has memories of width `hidden_size / num_heads`.
        memory: "mlp" (NL Eq. 89) or "matrix" for M_memory, M_k, M_v (and M_q). The gates' memories are always matrices
            with one output.
        depth: layers of an MLP memory.
        expansion: hidden width of an MLP memory over its head width.
        activation: of the MLP memories.
        adapt: the memories that learn in context, of "memory", "k", "v", "q", "eta", "alpha". The others keep their
            meta-learned weights (Table 6 ablates them one by one). Naming "q" makes q = M_q(x) (`adaptive_q`), which
            is otherwise the projection x W_q (Eq. 83).
        self_targets: every memory generates its own targets, M_m(v_t) (Eq. 84). Without it, the target is v_t (Titans).
        chunk_size: tokens in a chunk of M_memory.
        self_chunk_size: tokens in a chunk of the other memories, a multiple of `chunk_size`; None is the same.
        max_erase: upper end of (e_t + folded l_t) / a_t. 2 allows negative eigenvalues, which state tracking needs.
        inner_lr_scale: first value of the learnable share l_t / e_t, in (0, 1); None is 0.5 for matrices and 0.1 for
            MLPs, whose hidden layers take a step of |W|^2 times the rate.
        share_of: what that is a share of. "erase": l_t = share e_t, of which 1 is NL Eq. 88. "rate", for online
            gradients: of the whole rate r_t, l_t = share r_t and e_t = (1 - share) r_t, so that a share near 1 replaces
            what a key holds by its new value, and a share near 0 only takes it away. The layers before an MLP's last
            then start with the share `hidden_erase_scale`, or `hidden_lr_scale`.
        hidden_erase_scale: first value of the learnable share of e_t that the layers before an MLP's last one use (with
            the gates, which are stacked there), in (0, 1). 0.1: flipping the sign of a pre-activation means nothing to
            the layer after it.
        hidden_lr_scale: first value of the learnable share of the gradient step in these layers, in (0, 1). Their
            gradients are those of the chunk's start; written as fast as they are erased they move a pre-activation by
            the whole gradient, and the features that answers were stored under are others in the next chunk. None: as
            `share_of` says.
        gate_scale: how much faster than other weights the optimizer moves the gates' initial fast weights (see
            `MemoryBank`). Adam's steps of one size take a logit to +-4 in the time it takes others to be learned, where
            1 - e_t is -0.97; counting over hundreds of tokens needs it nearer to -1 than any short training asks for.
        use_retention: a_t from M_alpha; without it a_t = 1 and there is no alpha memory.
        conv_size: width of the causal convolution (4 in NL section 8.3); 1 is none.
        output_gate: multiply the normalised output by silu(x W_g).
        checkpoint_chunks: recompute the layer over this many chunks (of the larger size) at a time in the backward,
            projections included; None keeps all activations.
        compile_chunks: run the chunk step through `torch.compile` (some tens of seconds of compilation for
            every chunk length). Off by default, since a short run never earns it back, and on a CPU the C++ of
            `nestling.ops.native` is faster.
        norm_eps: of the output norm.
        own_streams: q, k, v and the rates each come from a projection and a convolution of their own (NL section 8.3).
            Without it one projection serves all but q, and has to hold a token and the one before it at once, in the
            width of a head.
        anchored: the memories are W_0 + F with the meta-learned W_0, and retention, erase and writes act on F. Without
            it retention takes the generators of keys, values and rates to nothing on a long text.
        identity: deep memories start as the identity, so that M_k, M_v hand their projections on until they have
            learned something. Random ones hide which key was which.
        others_scale: first value of the learnable share of the rates that the memories other than M_memory take, in
            (0, 1). A rate strong enough to store a value in one token is strong enough to erase a generator in a
            chunk. They also fade as fast as they are written, by 1 - share (e_t + l_t) / 2 a token, so that what they
            add to W_0 is a mean over their last writes and never outgrows it. Needs `anchored`. None: all take the same
            rates (NL Eq. 88 to the letter).
        generation_gain: first value of the learnable gain of what a memory adds to W_0 where it generates keys, values,
            queries, rates and targets, M = W_0 + gain F; M_memory still answers and learns with W_0 + F. From 0 a model
            learns what these updates are good for; one whose texts in training are no longer than a chunk never sees
            an update, and keeps none. Needs `anchored`. None is 1, and not learned.
        eta_start: logit of the rate at the start, before what the token says. At 0 and a `max_erase` of 2 every token
            replaces what its key holds, and keys that nothing has taught to stand apart yet erase each other; -1.1 is
            half of that.
        retention_start: logits of the retentions at the start, of the first head and of the last, with the others
            evenly between: a = sigmoid(logit)^(1/16). (0, 6) is 0.958 to 0.9998, of which the first keeps a twentieth
            over 70 tokens, so half of two heads cannot hold what a text of 128 tokens says.
        rate_stretch: sigma_t = rate_stretch (sigmoid(eta_t) - 1/2) + 1/2, cut at 0 and 1, at least 1. Above 1 a rate
            reaches both its ends at finite logits: with `max_erase` 2 what a key holds is then multiplied by -1 and not
            by -0.97, or kept to the bit. A count over hundreds of tokens needs both, and 40 tokens of training do not
            ask for them.
        gate_bias: first bias of the output gate, whose weights then start at a tenth: above 0 the gate starts open.
            None is no bias. silu of a projection without one multiplies the answers by random signs.
        value_length: first value of the learnable length c, of every head, of what M_memory stores: its target is
            c M_memory(v). Values have length 1, as keys and queries. An answer W_0 q + F q holds a part of q and of the
            keys that were written, and a value no longer than a key is hard to tell from them. None is 1, and not
            learned.

    Raises:
        ValueError: sizes that do not divide, unknown memories, or a rule that has no closed form.
    """

    hidden_size: int
    num_heads: int
    memory: Literal["mlp", "matrix"] = "mlp"
    depth: int = 2
    expansion: int = 1
    activation: Literal["silu", "gelu", "relu"] = "silu"
    adapt: tuple[str, ...] = ADAPTIVE
    self_targets: bool = True
    chunk_size: int = 64
    self_chunk_size: int | None = None
    max_erase: float = 2.0
    inner_lr_scale: float | None = None
    hidden_erase_scale: float = 0.1
    gate_scale: float = 1.0
    use_retention: bool = True
    conv_size: int = 4
    output_gate: bool = True
    checkpoint_chunks: int | None = None
    compile_chunks: bool = False
    norm_eps: float = 1e-6
    share_of: Literal["erase", "rate"] = field(default="erase", metadata=NEW_FIELD)
    own_streams: bool = field(default=False, metadata=NEW_FIELD)
    anchored: bool = field(default=False, metadata=NEW_FIELD)
    identity: bool = field(default=False, metadata=NEW_FIELD)
    others_scale: float | None = field(default=None, metadata=NEW_FIELD)
    generation_gain: float | None = field(default=None, metadata=NEW_FIELD)
    eta_start: float = field(default=0.0, metadata=NEW_FIELD)
    retention_start: tuple[float, float] = field(default=(0.0, 6.0), metadata=NEW_FIELD)
    rate_stretch: float = field(default=1.0, metadata=NEW_FIELD)
    hidden_lr_scale: float | None = field(default=None, metadata=NEW_FIELD)
    gate_bias: float | None = field(default=None, metadata=NEW_FIELD)
    value_length: float | None = field(default=None, metadata=NEW_FIELD)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "adapt", tuple(self.adapt))
        object.__setattr__(self, "retention_start", tuple(self.retention_start))
        if len(self.retention_start) != 2:
            raise ValueError(f"retention_start is two logits, first head and last, not {self.retention_start}")
        sizes = (
            "hidden_size",
            "num_heads",
            "chunk_size",
            "self_chunk_size",
            "expansion",
            "conv_size",
            "checkpoint_chunks",
        )
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.memory not in ("mlp", "matrix"):
            raise ValueError(f"memory is 'mlp' or 'matrix', not {self.memory!r}")
        if self.memory == "mlp" and self.depth < 2:
            raise ValueError(f"an MLP memory has depth >= 2, not {self.depth}; use memory='matrix' for one weight")
        if self.activation not in ("silu", "gelu", "relu"):
            raise ValueError(f"activation is 'silu', 'gelu' or 'relu', not {self.activation!r}")
        if unknown := set(self.adapt) - {*DEEP, *GATES}:
            raise ValueError(f"adapt names {sorted(unknown)}; memories are {', '.join(DEEP + GATES)}")
        if "memory" not in self.adapt:
            raise ValueError("adapt must name 'memory': a layer whose main memory never learns is a feed-forward layer")
        if self.outer_chunk % self.chunk_size:
            raise ValueError(
                f"self_chunk_size {self.self_chunk_size} is not a multiple of chunk_size {self.chunk_size}"
            )
        if not 0 < self.max_erase <= 2:
            raise ValueError(f"max_erase is in (0, 2], not {self.max_erase}: beyond 2 the erase is no contraction")
        if not 0 < self.share < 1:
            raise ValueError(f"inner_lr_scale is in (0, 1), not {self.share}")
        if self.rate_stretch < 1:
            raise ValueError(f"rate_stretch is at least 1, not {self.rate_stretch}: no rate could reach its ends")
        if self.gate_scale <= 0:
            raise ValueError(f"gate_scale is positive, not {self.gate_scale}")
        for name in ("hidden_erase_scale", "hidden_lr_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} is in (0, 1), not {value}")
        if self.others_scale is not None and not 0 < self.others_scale < 1:
            raise ValueError(f"others_scale is in (0, 1), or None for the rates of M_memory; not {self.others_scale}")
        if self.others_scale is not None and not self.anchored:
            raise ValueError(
                "others_scale needs anchored=True: the other memories fade fast, and without it to nothing"
            )
        if self.generation_gain is not None and not self.anchored:
            raise ValueError("generation_gain needs anchored=True: it is of what is added to the first weights")
        if self.value_length is not None and self.value_length <= 0:
            raise ValueError(f"value_length is positive, or None for values of length 1; not {self.value_length}")
        if self.share_of not in ("erase", "rate"):
            raise ValueError(f"share_of is 'erase' or 'rate', not {self.share_of!r}")
        if self.share_of == "rate" and not (self.gradient == "online" and self.objective == "l2" and self.erase):
            raise ValueError(
                "share_of='rate' divides the rate of an online write, which takes what a key holds along with it; it "
                "needs gradient='online', objective='l2' and erase=True"
            )

    @property
    def outer_chunk(self) -> int:
        """Chunk of the memories other than M_memory; positions count modulo it."""
        return self.self_chunk_size or self.chunk_size

    @property
    def share(self) -> float:
        """First value of l_t / e_t."""
        if self.inner_lr_scale is not None:
            return self.inner_lr_scale
        if self.share_of == "rate":
            return 0.9
        return 0.5 if self.memory == "matrix" else 0.1

    @property
    def layers(self) -> int:
        """Weights of a deep memory."""
        return self.depth if self.memory == "mlp" else 1

    @property
    def shares(self) -> list[float]:
        """First values of the shares, a layer each."""
        hidden = self.hidden_erase_scale if self.share_of == "rate" else self.share
        hidden = hidden if self.hidden_lr_scale is None else self.hidden_lr_scale
        return [hidden] * (self.layers - 1) + [self.share]

    @property
    def rates(self) -> RateRule:
        """The formula of the rates (see `layers.rates.chunk_rates`)."""
        split = self.share_of == "rate"
        return rate_rule(self, self.max_erase, self.outer_chunk, split, self.rate_stretch)
