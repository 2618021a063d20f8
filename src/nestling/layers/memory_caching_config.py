"""Settings of Memory Caching."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from nestling.layers.linear_config import LinearMemoryConfig
from nestling.layers.neural_memory_config import NeuralMemoryConfig
from nestling.layers.self_modifying_config import SelfModifyingConfig

Variant = Literal["residual", "gated", "soup", "sparse"]
VARIANTS: tuple[str, ...] = get_args(Variant)

CacheableConfig = LinearMemoryConfig | NeuralMemoryConfig | SelfModifyingConfig
CACHEABLE: dict[str, type[CacheableConfig]] = {
    "linear_memory": LinearMemoryConfig,
    "neural_memory": NeuralMemoryConfig,
    "self_modifying": SelfModifyingConfig,
}
"""Kinds of layers whose memories can be kept."""


@dataclass(frozen=True, kw_only=True)
class MemoryCachingConfig:
    """Settings of `MemoryCaching`.

    Attributes:
        hidden_size: width of the layer's input and output.
        inner: settings of the layer whose memory is kept.
        segment_size: tokens after which the memory is kept. The paper has 256 for texts of 4,096.
        variant: what a token hears of the kept memories and the running one: "residual", the sum of all answers;
            "gated", their average by the router's softmax; "soup", the answer of the average of their weights;
            "sparse", "gated" with the `top_k` kept memories that the router scores highest, and the running one.
        top_k: kept memories that a token reads with "sparse".
        restart: every segment begins with the memory's first state (the paper's independent compressors); without it,
            with what the segment before left (its checkpoints). The paper leaves open which is better.
        router_width: of the router's vectors, per head; None is the head's width.

    Raises:
        ValueError: a size below 1, an unknown variant, or an inner layer whose memory cannot be kept so.
    """

    hidden_size: int
    inner: CacheableConfig
    segment_size: int = 64
    variant: Variant = "gated"
    top_k: int = 2
    restart: bool = True
    router_width: int | None = None

    def __post_init__(self) -> None:
        if type(self.inner) not in CACHEABLE.values():
            raise ValueError(f"inner is one of {', '.join(CACHEABLE)}, not {type(self.inner).__name__}")
        if self.inner.hidden_size != self.hidden_size:
            raise ValueError(f"hidden_size is {self.hidden_size} and the inner layer's {self.inner.hidden_size}")
        for name in ("segment_size", "top_k", "router_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is one of {', '.join(map(repr, VARIANTS))}, not {self.variant!r}")
        if "q" in getattr(self.inner, "adapt", ()):
            raise ValueError(
                "a kept memory is asked with queries from the tokens; it needs the inner adapt without 'q'"
            )
        if getattr(self.inner, "divergence", "l2") == "kl":
            raise ValueError("a memory with divergence='kl' cannot be kept: its state is the logarithms of its weights")
        if self.variant == "soup" and getattr(self.inner, "read", "token") != "token":
            raise ValueError("variant='soup' averages the weights that a token reads; it needs the inner read='token'")

    @property
    def num_heads(self) -> int:
        """Of the inner layer."""
        return self.inner.num_heads

    @property
    def gate_width(self) -> int:
        """Width of the router's vectors."""
        return max(1, self.hidden_size // self.num_heads) if self.router_width is None else self.router_width

    @property
    def inside(self) -> CacheableConfig:
        """Settings the inner layer is built with: what is computed again in the backward pass is the whole layer."""
        if isinstance(self.inner, LinearMemoryConfig):
            return self.inner
        return replace(self.inner, checkpoint_chunks=None)

    @property
    def stride(self) -> int | None:
        """Tokens whose activations the backward pass computes again at a time."""
        if isinstance(self.inner, LinearMemoryConfig) or self.inner.checkpoint_chunks is None:
            return None
        chunk = self.inner.outer_chunk if isinstance(self.inner, SelfModifyingConfig) else self.inner.chunk_size
        return self.inner.checkpoint_chunks * chunk
