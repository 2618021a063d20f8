"""Models with one level more: Linear Attention++ and the AdaTransformer (NL section 3.2, Figure 3)."""

from __future__ import annotations

from nestling.layers.scalar_retention import Kernel
from nestling.models.configuration import NestlingConfig
from nestling.models.presets.linear import LINEAR_ATTENTION
from nestling.models.presets.sizes import (
    BlockSpec,
    assemble,
    fit_width,
    heads_of,
    shape_of,
    transformer_block_parameters,
)


def linear_attention_pp(
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
    """Linear Attention++: linear attention whose memory starts from learned weights. Arguments as `linear_attention`.

    Its memory answers before it has read anything, as an MLP does, and adapts to the context from there.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    memory = {"kind": "linear_memory", "chunk_size": chunk_size, "kernel": kernel}
    mixer = memory | LINEAR_ATTENTION | {"initial": True}
    return assemble(shape, [mixer], {"kind": "feed_forward"}, num_heads, intermediate_size, tie_word_embeddings)


def ada_transformer(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    window: int | None = None,
    intermediate_size: int | None = None,
    chunk_size: int = 64,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """AdaTransformer: Transformer++ whose MLPs learn in context, from the keys and values of the attention before them.

    Its parameters are Transformer++'s, but for one norm and one rate a block.

    Args:
        size: one of `SIZES`. What the other arguments leave None comes from it.
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        num_layers: blocks.
        loops: how often the blocks run, with a state of its own each time (`nestling.models.looping`).
        num_heads: heads of the attention; heads keep the size's width if None.
        window: tokens in view of the attention; None sees everything.
        intermediate_size: hidden width of the networks; if None the one whose parameters equal Transformer++'s.
        chunk_size: tokens in a chunk of the memory; the results do not depend on it.
        tie_word_embeddings: use the embedding as the output projection.

    Raises:
        ValueError: an unknown size, or sizes that do not fit each other.
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    heads = heads_of(shape, num_heads)
    mixer = {"kind": "ada_transformer", "num_heads": heads, "window": window, "chunk_size": chunk_size}

    def blocks(width: int) -> list[BlockSpec]:
        return [{"mixer": mixer | {"intermediate_size": width}, "channel": None}]

    if intermediate_size is None:
        intermediate_size = fit_width(shape.hidden_size, blocks, transformer_block_parameters(shape), shape.multiple)
    return NestlingConfig(
        blocks=blocks(intermediate_size) * shape.num_layers,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        tie_word_embeddings=tie_word_embeddings,
        loops=shape.loops,
    )
