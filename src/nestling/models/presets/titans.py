"""Titans: the neural memory alone and beside attention; Moneta, Yaad and Memora of Miras."""

from __future__ import annotations

from typing import Any

from nestling.models.configuration import NestlingConfig
from nestling.models.presets.sizes import assemble, shape_of

SHORT, LONG = ("tiny",), ("340m", "760m", "1.3b")
SEGMENT = dict.fromkeys(SHORT, 64) | dict.fromkeys(LONG, 128)
"""Tokens in a segment, which is also the chunk of its memory. The paper gives no number."""
WINDOW = dict.fromkeys(SHORT, 64) | dict.fromkeys(LONG, 512)
"""Tokens in view of a sliding window: an eighth of the length that the large sizes are trained at in the literature."""
PERSISTENT = dict.fromkeys(SHORT, 4) | dict.fromkeys(LONG, 16)
"""Persistent tokens; few, since every token attends to all of them."""
FEED_FORWARD = {"kind": "feed_forward"}
ONLINE = {
    "max_erase": 2.0,
    "inner_lr_scale": 0.02,
    "first_momentum": 0.4,
    "retention_start": [6.0, 9.0],
    "gate_bias": 1.0,
}
"""First values beside online gradients. One write stores 0.43 of a value, and the surprise carries several, which found
recall sooner than stronger writes with less of it. Hidden layers, whose gradients are those of the chunk's start, move
little under what the output weight has stored. No head forgets it within thousands of tokens. The output gate starts
open."""


def titans_lmm(
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
    gradient: str = "online",
    momentum: bool = True,
    rates: str = "token",
    persistent_tokens: int | None = None,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Titans (LMM): the neural memory without attention (Titans sections 3 and 4.3), then a feed-forward network.

    Args:
        size: one of `SIZES`. What the other arguments leave None comes from it.
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        num_layers: blocks.
        loops: how often the blocks run, with a state of its own each time (`nestling.models.looping`).
        num_heads: heads of the mixer; heads keep the size's width if None.
        intermediate_size: width of the feed-forward network; if None the one whose parameters equal Transformer++'s.
        depth: layers of a memory.
        chunk_size: tokens in a chunk of the memories.
        gradient: "online" takes the output weight's gradient token by token (Titans Eq. 32-33), and starts with rates
            that store a value; "chunk" takes all at the chunk's start (Eq. 16), where rates must be small.
        momentum: keep a running surprise.
        rates: "token" or "chunk".
        persistent_tokens: that the memory reads before a document (section 3.3); None takes the size's.
        tie_word_embeddings: use the embedding as the output projection.

    Raises:
        ValueError: an unknown size, or sizes that do not fit each other.

    Examples:
        >>> from nestling import NestlingForCausalLM, presets
        >>> NestlingForCausalLM(presets.titans_lmm(size="tiny", num_layers=1)).config.blocks[0]["mixer"]["kind"]
        'neural_memory'
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _memory("neural_memory", depth, chunk_size, momentum) | {"rates": rates, "gradient": gradient}
    mixer |= ONLINE if gradient == "online" else {}
    mixer["persistent_tokens"] = PERSISTENT[size] if persistent_tokens is None else persistent_tokens
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def titans_mac(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    depth: int = 2,
    segment_size: int | None = None,
    chunk_size: int | None = None,
    persistent_tokens: int | None = None,
    momentum: bool = True,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Titans (MAC): memory as context (Titans section 4.1).

    `segment_size` and `persistent_tokens` are `MemoryAsContextConfig`'s; None takes the size's. `chunk_size` None is
    the segment, whose write then takes all gradients at the memory before it, as in the paper. The others as in
    `titans_lmm`.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    segment = SEGMENT[size] if segment_size is None else segment_size
    persistent = PERSISTENT[size] if persistent_tokens is None else persistent_tokens
    mixer = _memory("memory_as_context", depth, segment if chunk_size is None else chunk_size, momentum)
    mixer |= {"segment_size": segment, "persistent_tokens": persistent}
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def titans_mag(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    depth: int = 2,
    window: int | None = None,
    chunk_size: int = 64,
    persistent_tokens: int | None = None,
    momentum: bool = True,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Titans (MAG): memory as gate (Titans section 4.2).

    `window` and `persistent_tokens` are `MemoryAsGateConfig`'s; None takes the size's. The others as in `titans_lmm`.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _memory("memory_as_gate", depth, chunk_size, momentum) | _windowed(size, window, persistent_tokens)
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def titans_mal(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    depth: int = 2,
    window: int | None = None,
    chunk_size: int = 64,
    persistent_tokens: int | None = None,
    momentum: bool = True,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Titans (MAL): memory as layer (Titans section 4.3); arguments as in `titans_mag`."""
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _memory("memory_as_layer", depth, chunk_size, momentum) | _windowed(size, window, persistent_tokens)
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def moneta(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    chunk_size: int = 64,
    p: float = 3.0,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Moneta (Miras): an L_p objective with p = 3, an MLP memory of expansion 4 with GELU, no momentum.

    Its retention is the L2 one, q = 2 in Miras' terms. The others as in `titans_lmm`.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _miras(chunk_size) | {"objective": "lp", "p": p}
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def yaad(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    chunk_size: int = 64,
    delta: float = 1.0,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Yaad (Miras): a Huber objective, quadratic up to `delta`, otherwise as `moneta`."""
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _miras(chunk_size) | {"objective": "huber", "delta": delta}
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def memora(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    chunk_size: int = 64,
    read: str = "token",
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Memora (Miras): an L2 objective, and retention by a Kullback-Leibler divergence, otherwise as `moneta`.

    `read="chunk"` reads the memory of the chunk's start, with which a token does not see the last ones and reads cost
    as little as other memories' (`NeuralMemoryConfig`).
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _miras(chunk_size) | {"divergence": "kl", "read": read}
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def _memory(kind: str, depth: int, chunk_size: int, momentum: bool) -> dict[str, Any]:
    return {"kind": kind, "depth": depth, "chunk_size": chunk_size, "momentum": momentum}


def _miras(chunk_size: int) -> dict[str, Any]:
    return _memory("neural_memory", 2, chunk_size, False) | {"expansion": 4, "activation": "gelu"}


def _windowed(size: str, window: int | None, persistent_tokens: int | None) -> dict[str, Any]:
    return {
        "window": WINDOW[size] if window is None else window,
        "persistent_tokens": PERSISTENT[size] if persistent_tokens is None else persistent_tokens,
    }
