"""Deep linear attention and the Omega rule of Atlas (arXiv:2505.23735)."""

from __future__ import annotations

from typing import Any

from nestling.models.configuration import NestlingConfig
from nestling.models.presets.sizes import assemble, shape_of
from nestling.models.presets.titans import FEED_FORWARD


def dla(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    depth: int = 2,
    chunk_size: int = 64,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Deep linear attention (DLA): gated linear attention whose memory is an MLP, with expansion 4 and GELU.

    The objective is the dot product, M_t = a_t M_{t-1} + l_t grad <M(k_t), v_t>, without momentum. At depth 1 it is
    gated linear attention. The arguments are `titans_lmm`'s.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _memory(depth, chunk_size) | {"objective": "dot"}
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def omeganet(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    depth: int = 2,
    chunk_size: int = 64,
    objective_window: int = 8,
    momentum: bool = False,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """OmegaNet: the neural memory with the Omega rule, an L2 objective over a window of past tokens (NL Eq. 68).

    An MLP memory of expansion 4 with GELU. `objective_window` is `NeuralMemoryConfig`'s, for which no number of the
    paper is known here; with `momentum` it is Atlas without Newton-Schulz. The others are `titans_lmm`'s.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _memory(depth, chunk_size) | {"objective_window": objective_window, "momentum": momentum}
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def _memory(depth: int, chunk_size: int) -> dict[str, Any]:
    """An MLP with expansion 4 and GELU (Atlas section 6), without momentum."""
    mixer = {"kind": "neural_memory", "depth": depth, "chunk_size": chunk_size, "momentum": False}
    return mixer | {"expansion": 4, "activation": "gelu"}
