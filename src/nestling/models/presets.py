"""Configurations of the usual models, at four sizes with equal parameters.

The widths and depths of the three large sizes are the ones the field compares at (24 blocks of width 1024, 1536 and
2048); `tiny` is for tests and for experiments on a CPU, about a million parameters without the embedding. Transformer++
sets the parameter count of a size, and the other models get the channel width that comes nearest to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nestling.models.configuration import NestlingConfig
from nestling.models.modeling import Block


@dataclass(frozen=True)
class Size:
    """What the presets of one size share.

    Attributes:
        hidden_size: width of the residual stream.
        num_layers: blocks.
        head_dim: width of a head.
        intermediate_size: of Transformer++'s feed-forward network.
        multiple: channel widths are rounded to it (64 suits matrix units).
        vocab_size: 259 is the byte tokenizer's, 32000 the usual one in the literature.
        periods: of the continuum's levels, in tokens; None never updates. Slow levels are there to see several updates
            within the context that the size is meant for.
    """

    hidden_size: int
    num_layers: int
    head_dim: int
    intermediate_size: int
    multiple: int
    vocab_size: int
    periods: tuple[int | None, ...]


_SIZES = {
    "tiny": Size(128, 4, 32, 512, 8, 259, (64, 256, None)),
    "340m": Size(1024, 24, 64, 2816, 64, 32000, (512, 2048, None)),
    "760m": Size(1536, 24, 64, 4096, 64, 32000, (512, 2048, None)),
    "1.3b": Size(2048, 24, 64, 5632, 64, 32000, (512, 2048, None)),
}
SIZES: tuple[str, ...] = tuple(_SIZES)
DEFAULT_TARGET = "value"


def hope(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
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
    """
    shape = _shape(size, vocab_size, hidden_size, num_layers)
    mixer = {"kind": "self_modifying", "memory": "mlp", "chunk_size": chunk_size, "momentum": momentum}
    channel = _continuum(periods or shape.periods, variant, target)
    return _assemble(shape, mixer, channel, num_heads, intermediate_size, tie_word_embeddings)


def hope_linear(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
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
    shape = _shape(size, vocab_size, hidden_size, num_layers)
    mixer = {"kind": "self_modifying", "memory": "matrix", "chunk_size": chunk_size, "momentum": momentum}
    channel = _continuum(periods or shape.periods, variant, target)
    return _assemble(shape, mixer, channel, num_heads, intermediate_size, tie_word_embeddings)


def hope_attention(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
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
    shape = _shape(size, vocab_size, hidden_size, num_layers)
    mixer = {"kind": "attention", "num_kv_heads": num_kv_heads, "window": window}
    channel = _continuum(periods or shape.periods, variant, target)
    return _assemble(shape, mixer, channel, num_heads, intermediate_size, tie_word_embeddings)


def transformer(
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    window: int | None = None,
    intermediate_size: int | None = None,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Transformer++: RMSNorm, rotary positions, softmax attention, SwiGLU; arguments as in `hope_attention`."""
    shape = _shape(size, vocab_size, hidden_size, num_layers)
    mixer = {"kind": "attention", "num_kv_heads": num_kv_heads, "window": window}
    channel = {"kind": "feed_forward"}
    return _assemble(shape, mixer, channel, num_heads, intermediate_size, tie_word_embeddings)


def _continuum(periods: Sequence[int | None], variant: str, target: str) -> dict[str, Any]:
    return {"kind": "continuum", "periods": list(periods), "variant": variant, "target": target}


PRESETS: dict[str, Callable[..., NestlingConfig]] = {
    "hope": hope,
    "hope_linear": hope_linear,
    "hope_attention": hope_attention,
    "transformer": transformer,
}


def _shape(size: str, vocab_size: int | None, hidden_size: int | None, num_layers: int | None) -> Size:
    """The size with what the caller overrides; Transformer++'s channel keeps its proportion to the width."""
    if size not in _SIZES:
        raise ValueError(f"unknown size {size!r}; sizes: {', '.join(SIZES)}")
    base = _SIZES[size]
    width = base.hidden_size if hidden_size is None else hidden_size
    return Size(
        hidden_size=width,
        num_layers=base.num_layers if num_layers is None else num_layers,
        head_dim=base.head_dim,
        intermediate_size=_rounded(base.intermediate_size * width / base.hidden_size, base.multiple),
        multiple=base.multiple,
        vocab_size=base.vocab_size if vocab_size is None else vocab_size,
        periods=base.periods,
    )


def _assemble(
    shape: Size,
    mixer: dict[str, Any],
    channel: dict[str, Any],
    num_heads: int | None,
    intermediate_size: int | None,
    tie_word_embeddings: bool,
) -> NestlingConfig:
    heads = max(1, shape.hidden_size // shape.head_dim) if num_heads is None else num_heads
    block = {"mixer": mixer | {"num_heads": heads}, "channel": channel}
    if intermediate_size is None:
        reference = {"mixer": {"kind": "attention", "num_heads": heads}, "channel": {"kind": "feed_forward"}}
        target = _block_parameters(shape.hidden_size, reference, shape.intermediate_size)
        intermediate_size = fit_intermediate_size(shape.hidden_size, block, target, shape.multiple)
    return NestlingConfig(
        blocks=[_with_width(block, intermediate_size)] * shape.num_layers,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        tie_word_embeddings=tie_word_embeddings,
    )


def fit_intermediate_size(hidden_size: int, block: dict[str, Any], target: int, multiple: int) -> int:
    """The `intermediate_size` of the channel with which a block has about `target` parameters.

    Args:
        hidden_size: width of the residual stream.
        block: block spec whose channel lacks `intermediate_size`.
        target: parameters wanted.
        multiple: the result's divisor.
    """
    # Parameters are affine in the width of the channel, so two counts say all, whatever the layers are.
    one, two = (_block_parameters(hidden_size, block, width) for width in (multiple, 2 * multiple))
    return _rounded(multiple * (1 + (target - one) / (two - one)), multiple)


def _block_parameters(hidden_size: int, block: dict[str, Any], intermediate_size: int) -> int:
    config = NestlingConfig(blocks=[_with_width(block, intermediate_size)], hidden_size=hidden_size)
    with torch.device("meta"):
        return sum(p.numel() for p in Block(config, 0).parameters())


def _with_width(block: dict[str, Any], intermediate_size: int) -> dict[str, Any]:
    return {"mixer": block["mixer"], "channel": block["channel"] | {"intermediate_size": intermediate_size}}


def _rounded(value: float, multiple: int) -> int:
    return max(1, round(value / multiple)) * multiple
