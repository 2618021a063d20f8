"""Memory Caching: other presets whose memories are kept at the ends of segments."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from nestling.layers.memory_caching_config import CACHEABLE, Variant
from nestling.models.configuration import NestlingConfig
from nestling.models.presets.atlas import dla, omeganet
from nestling.models.presets.delta import comba, gated_deltaproduct, kimi_delta
from nestling.models.presets.hope import hope, hope_linear
from nestling.models.presets.linear import deltanet, gated_deltanet, linear_attention, retnet
from nestling.models.presets.sizes import assemble, shape_of
from nestling.models.presets.titans import moneta, titans_lmm, yaad

MEMORIES: dict[str, Callable[..., NestlingConfig]] = {
    "hope": hope,
    "hope_linear": hope_linear,
    "titans_lmm": titans_lmm,
    "moneta": moneta,
    "yaad": yaad,
    "dla": dla,
    "omeganet": omeganet,
    "deltanet": deltanet,
    "gated_deltanet": gated_deltanet,
    "gated_deltaproduct": gated_deltaproduct,
    "comba": comba,
    "kimi_delta": kimi_delta,
    "linear_attention": linear_attention,
    "retnet": retnet,
}
"""Presets whose memories can be kept, all of whose blocks are alike."""

SEGMENT = {"tiny": 64, "340m": 256, "760m": 256, "1.3b": 256}
"""Tokens in a segment. The paper has 256 for texts of 4,096 tokens."""


def memory_caching(
    size: str = "tiny",
    *,
    memory: str = "titans_lmm",
    variant: Variant = "gated",
    segment_size: int | None = None,
    top_k: int = 2,
    restart: bool = True,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    loops: int = 1,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    chunk_size: int = 64,
    tie_word_embeddings: bool = True,
) -> NestlingConfig:
    """Memory Caching (arXiv:2602.24281): a memory that is kept at every segment's end, for later tokens to read.

    Args:
        size: one of `SIZES`. What the other arguments leave None comes from it.
        memory: preset whose memories are kept, one of `MEMORIES`; Titans with gates did best in the paper.
        variant: "residual", "gated", "soup" or "sparse" (`MemoryCachingConfig`).
        segment_size: tokens in a segment; None is 64 at the size tiny and the paper's 256 at the others.
        top_k: kept memories that a token reads with "sparse".
        restart: every segment begins with the memory's first state.
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        num_layers: blocks.
        loops: how often the blocks run, with a state of its own each time (`nestling.models.looping`).
        num_heads: heads of the mixer; heads keep the size's width if None.
        intermediate_size: width of the channel; if None the one whose parameters equal Transformer++'s.
        chunk_size: tokens in a chunk of the memories.
        tie_word_embeddings: use the embedding as the output projection.

    Raises:
        ValueError: an unknown size or memory, or sizes that do not fit each other.

    Examples:
        >>> from nestling import presets
        >>> config = presets.memory_caching(memory="deltanet", segment_size=32)
        >>> config.blocks[0]["mixer"]["kind"], config.blocks[0]["mixer"]["inner"]["kind"]
        ('memory_caching', 'linear_memory')
    """
    shape = shape_of(size, vocab_size, hidden_size, num_layers, loops)
    if memory not in MEMORIES:
        raise ValueError(f"memory is one of {', '.join(MEMORIES)}, not {memory!r}")
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": 1, "num_heads": num_heads}
    (block,) = MEMORIES[memory](size, chunk_size=chunk_size, **sizes).blocks
    segment = SEGMENT[size] if segment_size is None else segment_size
    mixer = _cached(block["mixer"], segment_size=segment, variant=variant, top_k=top_k, restart=restart)
    channel = {name: value for name, value in block["channel"].items() if name != "intermediate_size"}
    return assemble(shape, [mixer], channel, num_heads, intermediate_size, tie_word_embeddings)


def with_memory_caching(
    config: NestlingConfig,
    *,
    segment_size: int,
    variant: Variant = "gated",
    top_k: int = 2,
    restart: bool = True,
) -> NestlingConfig:
    """The same model with every memory kept that can be (`CACHEABLE`); its other mixers stay as they are.

    Args:
        config: of any model; it is left alone.
        segment_size: tokens in a segment.
        variant: see `MemoryCachingConfig`.
        top_k: see there.
        restart: see there.

    Raises:
        ValueError: no mixer of the model has a memory that can be kept.

    Examples:
        >>> from nestling import presets
        >>> config = presets.with_memory_caching(presets.gated_deltanet(), segment_size=128, variant="sparse")
        >>> config.blocks[0]["mixer"]["variant"]
        'sparse'
    """
    changed = deepcopy(config)
    settings = {"segment_size": segment_size, "variant": variant, "top_k": top_k, "restart": restart}
    kept = [block for block in changed.blocks if block["mixer"]["kind"] in CACHEABLE]
    if not kept:
        kinds = sorted({block["mixer"]["kind"] for block in changed.blocks})
        raise ValueError(
            f"the model's mixers are {', '.join(kinds)}; those whose memory can be kept: {', '.join(CACHEABLE)}"
        )
    for block in kept:
        block["mixer"] = _cached(block["mixer"], **settings)
    return NestlingConfig.from_dict(changed.to_dict())


def _cached(mixer: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"kind": "memory_caching", "inner": mixer} | settings
