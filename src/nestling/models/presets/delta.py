"""Successors of Gated DeltaNet: a retention by channel, erases that differ from the writes, several writes a token."""

from __future__ import annotations

from typing import Any

from nestling.layers.scalar_retention import Kernel
from nestling.models.configuration import NestlingConfig
from nestling.models.presets.sizes import Size, assemble, heads_of, shape_of

FEED_FORWARD = {"kind": "feed_forward"}


def gated_deltaproduct(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    writes_per_token: int = 2,
    allow_neg_eigval: bool = True,
    chunk_size: int = 64,
    kernel: Kernel = "nestling",
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Gated DeltaProduct (Siems et al. 2025, arXiv:2502.10297): Gated DeltaNet with several writes a token.

    Args:
        size: one of `SIZES`. What the other arguments leave None comes from it.
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        num_layers: blocks.
        loops: how often the blocks run, with a state of its own each time (`nestling.models.looping`).
        num_heads: heads of the mixer; heads keep the size's width if None.
        intermediate_size: width of the feed-forward network; if None the one whose parameters equal Transformer++'s.
        writes_per_token: n_h, Householder factors of a token's transition.
        allow_neg_eigval: take beta from (0, 2), which products of reflections need, in place of (0, 1).
        chunk_size: writes in a chunk; the results do not depend on it.
        kernel: whose code runs the memories: "nestling", or "fla" on a CUDA GPU (`LinearMemoryConfig`).
        tie_word_embeddings: use the embedding as the output projection.

    Raises:
        ValueError: an unknown size, or sizes that do not fit each other.

    Examples:
        >>> from nestling import presets
        >>> presets.gated_deltaproduct(writes_per_token=3).mixer_config(0).writes_per_token
        3
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _gated(shape, num_heads) | {
        "writes_per_token": writes_per_token,
        "allow_neg_eigval": allow_neg_eigval,
        "output_gate": "silu",
        "chunk_size": chunk_size,
        "kernel": kernel,
    }
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def comba(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    output_feedback: float | None = 0.02,
    chunk_size: int = 64,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Comba (Hu et al. 2025, arXiv:2506.02475): the erase is a learned share of the write, and queries are corrected.

    Arguments as in `gated_deltaproduct`.

    Args:
        output_feedback: first value of d in q - d k; None reads with q. The authors' code says that 0.02 suits small
            models and 1 large ones.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _gated(shape, num_heads) | {
        "state_feedback": True,
        "output_feedback": output_feedback,
        "output_gate": "sigmoid",
        "chunk_size": chunk_size,
    }
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def kimi_delta(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    allow_neg_eigval: bool = False,
    chunk_size: int = 64,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Kimi Delta Attention in every block (Kimi Linear, arXiv:2510.26692): Gated DeltaNet that forgets by channel.

    Retention and output gate come from projections of the rank of a head. Kimi Linear itself has full attention in
    every fourth block, and experts. Arguments as in `gated_deltaproduct`.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    heads = heads_of(shape, num_heads)
    mixer: dict[str, Any] = {
        "kind": "linear_memory",
        "retention": "channel",
        "allow_neg_eigval": allow_neg_eigval,
        "output_gate": "sigmoid",
        "gate_rank": max(1, shape.hidden_size // heads),
        "chunk_size": chunk_size,
    }
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def rwkv7(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    chunk_size: int = 64,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """RWKV-7's time mixing (Peng et al. 2025, arXiv:2503.14456) with SwiGLU in place of its channel mixing.

    Arguments as in `gated_deltaproduct`.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = {"kind": "rwkv7", "chunk_size": chunk_size}
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def _gated(shape: Size, num_heads: int | None) -> dict[str, Any]:
    """Gated DeltaNet's widths: keys take 3/4 of the hidden size together and values 3/2."""
    key_dim = max(1, 3 * shape.hidden_size // (4 * heads_of(shape, num_heads)))
    return {"kind": "linear_memory", "key_dim": key_dim, "value_expansion": 2, "retention": "data"}
