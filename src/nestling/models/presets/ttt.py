"""Test-time training models: TTT-Linear and TTT-MLP (arXiv:2407.04620)."""

from __future__ import annotations

from typing import Any

from nestling.models.configuration import NestlingConfig
from nestling.models.presets.sizes import assemble, shape_of

FEED_FORWARD = {"kind": "feed_forward"}


def ttt_linear(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    chunk_size: int = 16,
    step: str = "sum",
    conv_size: int = 4,
    output_gate: bool = True,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """TTT-Linear with the parts of the Mamba backbone (convolutions, gate), then SwiGLU.

    Args:
        size: one of `SIZES`. What the other arguments leave None comes from it.
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        num_layers: blocks.
        loops: how often the blocks run, with a state of its own each time (`nestling.models.looping`).
        num_heads: heads of the mixer; heads keep the size's width if None.
        intermediate_size: width of the feed-forward network; if None the one whose parameters equal Transformer++'s.
        chunk_size: tokens of an inner mini-batch.
        step: "sum" or "mean" over a mini-batch's gradients, see `TTTConfig`.
        conv_size: width of the convolutions of q and k; 1 with `output_gate=False` is the Transformer backbone.
        output_gate: multiply the mixer's output by a gate.
        tie_word_embeddings: use the embedding as the output projection.

    Raises:
        ValueError: an unknown size, or sizes that do not fit each other.

    Examples:
        >>> from nestling import presets
        >>> presets.ttt_linear(size="tiny").blocks[0]["mixer"]["inner"]
        'linear'
    """
    mixer = _mixer("linear", chunk_size, step, conv_size, output_gate)
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def ttt_mlp(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    chunk_size: int = 16,
    step: str = "sum",
    conv_size: int = 4,
    output_gate: bool = True,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """TTT-MLP: the inner model is an MLP with one hidden layer; arguments as in `ttt_linear`."""
    mixer = _mixer("mlp", chunk_size, step, conv_size, output_gate)
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    return assemble(shape, [mixer], FEED_FORWARD, num_heads, intermediate_size, tie_word_embeddings)


def _mixer(inner: str, chunk_size: int, step: str, conv_size: int, output_gate: bool) -> dict[str, Any]:
    settings = {"chunk_size": chunk_size, "step": step, "conv_size": conv_size, "output_gate": output_gate}
    return {"kind": "ttt", "inner": inner, **settings}
