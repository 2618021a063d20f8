"""Hope, its variants, and Transformer++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nestling.models.configuration import NestlingConfig
from nestling.models.presets.sizes import assemble, shape_of

DEFAULT_TARGET = "value"
MEMORIES: dict[str, Any] = {
    "kind": "self_modifying",
    "gradient": "online",
    "share_of": "rate",
    "own_streams": True,
    "anchored": True,
    "identity": True,
    "others_scale": 0.05,
    "generation_gain": 0.0,
    "hidden_lr_scale": 0.001,
    "value_length": 1.5,
    "eta_start": -1.1,
    "retention_start": [4.0, 8.0],
    "rate_stretch": 1.03,
    "gate_bias": 1.0,
}
"""What all sizes of Hope share. `SelfModifyingConfig` says what each is for, `docs/architectures.md` what it does."""


def hope(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    chunk_size: int = 64,
    momentum: bool = False,
    periods: Sequence[int | None] | None = None,
    variant: str = "sequential",
    target: str = DEFAULT_TARGET,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Hope: self-modifying Titans with MLP memories, then the continuum memory system (NL section 8.3, Eq. 94-97).

    Args:
        size: one of `SIZES`. What the other arguments leave None comes from it.
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        num_layers: blocks.
        loops: how often the blocks run, with a state of its own each time (`nestling.models.looping`).
        num_heads: heads of the mixer; heads keep the size's width if None.
        intermediate_size: width of a level's MLP; if None the one whose parameters equal Transformer++'s.
        chunk_size: tokens in a chunk of the self-modifying memories.
        momentum: keep a running surprise.
        periods: update periods of the continuum's levels in tokens, fast to slow; None in it never updates.
        variant: of the continuum: "sequential", "nested" or "headwise".
        target: of the continuum's levels: "next", "value" or "reconstruction".
        tie_word_embeddings: use the embedding as the output projection.

    Raises:
        ValueError: an unknown size, or sizes that do not fit each other.

    Examples:
        >>> from nestling import presets
        >>> config = presets.hope(size="tiny", periods=(16, None))
        >>> config.blocks[0]["mixer"]["kind"], config.blocks[0]["channel"]["periods"]
        ('self_modifying', [16, None])
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = MEMORIES | {"memory": "mlp", "chunk_size": chunk_size, "momentum": momentum}
    channel = _continuum(periods or shape.periods, variant, target)
    return assemble(shape, [mixer], channel, num_heads, intermediate_size, tie_word_embeddings)


def hope_linear(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    chunk_size: int = 64,
    momentum: bool = False,
    periods: Sequence[int | None] | None = None,
    variant: str = "sequential",
    target: str = DEFAULT_TARGET,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Hope with matrix-valued memories, several times faster; arguments as in `hope`."""
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = MEMORIES | {"memory": "matrix", "chunk_size": chunk_size, "momentum": momentum}
    channel = _continuum(periods or shape.periods, variant, target)
    return assemble(shape, [mixer], channel, num_heads, intermediate_size, tie_word_embeddings)


def hope_attention(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    window: int | None = None,
    intermediate_size: int | None = None,
    periods: Sequence[int | None] | None = None,
    variant: str = "sequential",
    target: str = DEFAULT_TARGET,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Hope-Attention: softmax attention, then the continuum memory system (NL section 8.3).

    `num_kv_heads` and `window` are `AttentionConfig`'s, the other arguments those of `hope`.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = {"kind": "attention", "num_kv_heads": num_kv_heads, "window": window}
    channel = _continuum(periods or shape.periods, variant, target)
    return assemble(shape, [mixer], channel, num_heads, intermediate_size, tie_word_embeddings)


def transformer(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    window: int | None = None,
    intermediate_size: int | None = None,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Transformer++: RMSNorm, rotary positions, softmax attention, SwiGLU; arguments as in `hope_attention`."""
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = {"kind": "attention", "num_kv_heads": num_kv_heads, "window": window}
    channel = {"kind": "feed_forward"}
    return assemble(shape, [mixer], channel, num_heads, intermediate_size, tie_word_embeddings)


def _continuum(periods: Sequence[int | None], variant: str, target: str) -> dict[str, Any]:
    """With the gain: no update pays in language beyond the spread of the seeds (`reproductions/continuum_updates`)."""
    return {"kind": "continuum", "periods": list(periods), "variant": variant, "target": target, "gain": True}
