"""Four sizes with equal parameters, and the assembly of a preset to one of them.

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

BlockSpec = dict[str, Any]


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
            within the context that the size is meant for, and those of `tiny` to be trained by windows of 256 tokens.
        loops: how often the blocks run (`nestling.models.looping`).
    """

    hidden_size: int
    num_layers: int
    head_dim: int
    intermediate_size: int
    multiple: int
    vocab_size: int
    periods: tuple[int | None, ...]
    loops: int = 1


_SIZES = {
    "tiny": Size(128, 4, 32, 512, 8, 259, (64, 128, None)),
    "340m": Size(1024, 24, 64, 2816, 64, 32000, (512, 2048, None)),
    "760m": Size(1536, 24, 64, 4096, 64, 32000, (512, 2048, None)),
    "1.3b": Size(2048, 24, 64, 5632, 64, 32000, (512, 2048, None)),
}
SIZES: tuple[str, ...] = tuple(_SIZES)


def shape_of(
    size: str, vocab_size: int | None, hidden_size: int | None, num_layers: int | None, loops: int = 1
) -> Size:
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
        loops=loops,
    )


def assemble(
    shape: Size,
    mixers: Sequence[dict[str, Any]],
    channel: dict[str, Any],
    num_heads: int | None,
    intermediate_size: int | None,
    tie_word_embeddings: bool,
) -> NestlingConfig:
    """A model whose blocks take the mixers in turn, each followed by the channel.

    Args:
        shape: of the model.
        mixers: specs; those with a `num_heads` keep it.
        channel: spec without `intermediate_size`.
        num_heads: of the other mixers; heads keep the size's width if None.
        intermediate_size: of every channel; if None the one whose parameters equal Transformer++'s.
        tie_word_embeddings: use the embedding as the output projection.
    """
    heads = heads_of(shape, num_heads)

    def blocks(width: int) -> list[BlockSpec]:
        channels = channel | {"intermediate_size": width}
        # A mixer around another one has its heads.
        return [
            {"mixer": m if m["kind"] == "memory_caching" else {"num_heads": heads} | m, "channel": channels}
            for m in turns
        ]

    # A pattern that is not complete has to be fitted as it stands.
    whole = shape.num_layers % len(mixers) == 0
    turns = mixers if whole else [mixers[i % len(mixers)] for i in range(shape.num_layers)]
    if intermediate_size is None:
        target = len(turns) * transformer_block_parameters(shape)
        intermediate_size = fit_width(shape.hidden_size, blocks, target, shape.multiple)
    pattern = blocks(intermediate_size)
    return NestlingConfig(
        blocks=[pattern[i % len(pattern)] for i in range(shape.num_layers)],
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        tie_word_embeddings=tie_word_embeddings,
        loops=shape.loops,
    )


def heads_of(shape: Size, num_heads: int | None) -> int:
    """`num_heads`, or as many as keep the size's head width."""
    return max(1, shape.hidden_size // shape.head_dim) if num_heads is None else num_heads


def transformer_block_parameters(shape: Size) -> int:
    """Parameters of a Transformer++ block, which all presets of a size have to match."""
    channel = {"kind": "feed_forward", "intermediate_size": shape.intermediate_size}
    # The number of heads does not change the parameters.
    return block_parameters(shape.hidden_size, [{"mixer": {"kind": "attention", "num_heads": 1}, "channel": channel}])


def fit_width(hidden_size: int, blocks: Callable[[int], list[BlockSpec]], target: int, multiple: int) -> int:
    """The width with which the blocks together have about `target` parameters.

    Args:
        hidden_size: width of the residual stream.
        blocks: the specs for a width; their parameters must be affine in it.
        target: parameters wanted.
        multiple: the result's divisor.
    """
    one, two = (block_parameters(hidden_size, blocks(width)) for width in (multiple, 2 * multiple))
    return _rounded(multiple * (1 + (target - one) / (two - one)), multiple)


def block_parameters(hidden_size: int, blocks: list[BlockSpec]) -> int:
    """Parameters of the given blocks together."""
    config = NestlingConfig(blocks=blocks, hidden_size=hidden_size)
    with torch.device("meta"):
        return sum(p.numel() for i in range(len(blocks)) for p in Block(config, i).parameters())


def _rounded(value: float, multiple: int) -> int:
    return max(1, round(value / multiple)) * multiple
