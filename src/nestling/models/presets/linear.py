"""Models whose memory is a matrix written at rates that come from the input alone, and Samba."""

from __future__ import annotations

from typing import Any

from nestling.layers.scalar_retention import Kernel
from nestling.models.configuration import NestlingConfig
from nestling.models.presets.sizes import (
    BlockSpec,
    assemble,
    fit_width,
    heads_of,
    shape_of,
    transformer_block_parameters,
)

LINEAR_ATTENTION: dict[str, Any] = {
    "feature_map": "elu",
    "normalise_qk": False,
    "denominator": True,
    "retention": "none",
    "erase": False,
    "conv_size": 1,
    "output_gate": "none",
    "output_norm": "none",
}
"""Settings of `LinearMemory` that linear attention and Linear Attention++ share."""

RETNET_HEAD = 256
RETNET_HEADS = 4


def linear_attention(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    chunk_size: int = 64,
    kernel: Kernel = "nestling",
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236): elu + 1, divided by the sum of the weights.

    Args:
        size: one of `SIZES`. What the other arguments leave None comes from it.
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        num_layers: blocks.
        loops: how often the blocks run, with a state of its own each time (`nestling.models.looping`).
        num_heads: heads of the mixer; heads keep the size's width if None.
        intermediate_size: width of the feed-forward network; if None the one whose parameters equal Transformer++'s.
        chunk_size: tokens in a chunk; the results do not depend on it.
        kernel: whose code runs the memories: "nestling", or "fla" on a CUDA GPU (`LinearMemoryConfig`).
        tie_word_embeddings: use the embedding as the output projection.

    Raises:
        ValueError: an unknown size, or sizes that do not fit each other.

    Examples:
        >>> from nestling import presets
        >>> presets.linear_attention(size="340m").hidden_size
        1024
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _memory(chunk_size, kernel, **LINEAR_ATTENTION)
    return assemble(shape, [mixer], {"kind": "feed_forward"}, num_heads, intermediate_size, tie_word_embeddings)


def retnet(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    chunk_size: int = 64,
    kernel: Kernel = "nestling",
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """RetNet: rotary positions, a fixed retention per head, values of twice the keys' width, GroupNorm and SiLU gate.

    Arguments as in `linear_attention`, but for `num_heads`: if None, heads are 256 wide, as in the paper, and at least
    four. The retention 1 - 2^(-5 - h) depends on the head's number, so more heads would only add some that
    forget nothing.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _memory(
        chunk_size,
        kernel,
        value_expansion=2,
        feature_map="identity",
        normalise_qk=False,
        positions="rope",
        retention="fixed",
        erase=False,
        conv_size=1,
        output_gate="silu",
        output_norm="group",
    )
    heads = max(RETNET_HEADS, shape.hidden_size // RETNET_HEAD) if num_heads is None else num_heads
    return assemble(shape, [mixer], {"kind": "feed_forward"}, heads, intermediate_size, tie_word_embeddings)


def deltanet(
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
    kernel: Kernel = "nestling",
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """DeltaNet: short convolutions, SiLU, keys and queries of length 1, the delta rule, RMSNorm, no output gate.

    Arguments as in `linear_attention`; `allow_neg_eigval` takes beta from (0, 2) in place of (0, 1).
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _memory(
        chunk_size,
        kernel,
        feature_map="silu",
        normalise_qk=True,
        retention="none",
        erase=True,
        allow_neg_eigval=allow_neg_eigval,
        conv_size=4,
        output_gate="none",
        output_norm="rms",
    )
    return assemble(shape, [mixer], {"kind": "feed_forward"}, num_heads, intermediate_size, tie_word_embeddings)


def gated_deltanet(
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
    kernel: Kernel = "nestling",
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Gated DeltaNet: DeltaNet with a retention from the input, a SiLU output gate, and values twice as wide as keys.

    Keys take 3/4 of the hidden size together and values 3/2, as in the paper. Arguments as in `deltanet`.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    mixer = _memory(
        chunk_size,
        kernel,
        key_dim=max(1, 3 * shape.hidden_size // (4 * heads_of(shape, num_heads))),
        value_expansion=2,
        feature_map="silu",
        normalise_qk=True,
        retention="data",
        erase=True,
        allow_neg_eigval=allow_neg_eigval,
        conv_size=4,
        output_gate="silu",
        output_norm="rms",
    )
    return assemble(shape, [mixer], {"kind": "feed_forward"}, num_heads, intermediate_size, tie_word_embeddings)


def mamba2(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    state_size: int | None = None,
    num_groups: int = 1,
    chunk_size: int = 64,
    kernel: Kernel = "nestling",
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Mamba-2: nothing but Mamba-2 blocks, two for every block of a Transformer, since they have no channel mixer.

    Args:
        size: one of `SIZES`. What the other arguments leave None comes from it.
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        num_layers: pairs of blocks.
        loops: how often the blocks run, with a state of its own each time (`nestling.models.looping`).
        num_heads: heads; they keep the size's width if None, which makes twice as many as in a Transformer.
        state_size: width of B and C; if None the one whose parameters equal Transformer++'s (the paper has 128).
        num_groups: groups of heads that share B and C.
        chunk_size: tokens in a chunk; the results do not depend on it.
        kernel: whose code runs the memories: "nestling", or "fla" on a CUDA GPU (`LinearMemoryConfig`).
        tie_word_embeddings: use the embedding as the output projection.

    Raises:
        ValueError: an unknown size, or sizes that do not fit each other.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    heads = 2 * heads_of(shape, None) if num_heads is None else num_heads
    mixer = {"kind": "mamba2", "num_heads": heads, "num_groups": num_groups, "chunk_size": chunk_size, "kernel": kernel}

    def blocks(width: int) -> list[BlockSpec]:
        return [{"mixer": mixer | {"state_size": width}, "channel": None}] * 2

    if state_size is None:
        state_size = fit_width(shape.hidden_size, blocks, transformer_block_parameters(shape), shape.multiple)
    return NestlingConfig(
        blocks=blocks(state_size) * shape.num_layers,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        tie_word_embeddings=tie_word_embeddings,
        loops=shape.loops,
    )


def samba(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    window: int | None = None,
    state_size: int = 64,
    intermediate_size: int | None = None,
    chunk_size: int = 64,
    kernel: Kernel = "nestling",
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Samba: blocks of Mamba and MLP alternate with blocks of sliding-window attention and MLP.

    Mamba-2 stands in for the paper's Mamba: one retention a head in place of one a channel and state entry, so that it
    runs on the same rule as the other models.

    Args:
        size: one of `SIZES`. What the other arguments leave None comes from it.
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        num_layers: blocks of both kinds together.
        loops: how often the blocks run, with a state of its own each time (`nestling.models.looping`).
        num_heads: attention heads; heads keep the size's width if None. Mamba-2 has twice as many.
        num_kv_heads: key and value heads of the attention; as many as query heads if None.
        window: tokens in view of the attention; None is 64 at the size tiny and the paper's 2048 at the others.
        state_size: width of Mamba-2's B and C.
        intermediate_size: width of the feed-forward networks; if None the one whose parameters equal Transformer++'s.
        chunk_size: tokens in a chunk of Mamba-2; the results do not depend on it.
        kernel: whose code runs Mamba-2's memories: "nestling", or "fla" on a CUDA GPU (`LinearMemoryConfig`).
        tie_word_embeddings: use the embedding as the output projection.

    Raises:
        ValueError: an unknown size, or sizes that do not fit each other.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    heads = 2 * heads_of(shape, num_heads)
    window = (64 if size == "tiny" else 2048) if window is None else window
    mixers: list[dict[str, Any]] = [
        {"kind": "mamba2", "num_heads": heads, "state_size": state_size, "chunk_size": chunk_size, "kernel": kernel},
        {"kind": "attention", "num_kv_heads": num_kv_heads, "window": window},
    ]
    return assemble(shape, mixers, {"kind": "feed_forward"}, num_heads, intermediate_size, tie_word_embeddings)


def _memory(chunk_size: int, kernel: Kernel, **settings: Any) -> dict[str, Any]:
    return {"kind": "linear_memory", "chunk_size": chunk_size, "kernel": kernel} | settings
