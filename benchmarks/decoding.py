"""Decoding: neither the time a token takes nor the state may grow with the number of tokens read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.report import Report, Verdict
from benchmarks.subjects import HEADS, WIDTH, matrix_config, mlp_config
from benchmarks.timing import Subject, interleave, speed_ratio
from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
from nestling.memory.state import State

TOKENS = 100_000
BLOCK = 256  # tokens decoded at a stretch: four chunks, so that every block holds the same boundaries
FLAT = 1.10


def decoding(rounds: int, quick: bool, full: bool) -> Report:
    """Time a token and state bytes, early and after 100,000 tokens.

    The state after 100,000 tokens comes from reading them in parallel, which is the same computation; blocks decoded
    from the early and from the late state then alternate. With `full`, every one of the 100,000 tokens is decoded.
    """
    tokens = 2_048 if quick else TOKENS
    columns = [
        "one token at a time, batch 1",
        "ms a token",
        f"ms after {tokens:,}",
        "growth",
        "state KiB",
        f"KiB after {tokens:,}",
    ]
    report = Report("Decoding", columns)
    for name, config in (("matrix memories", matrix_config()), ("MLP memories, momentum", mlp_config())):
        torch.manual_seed(0)
        layer = SelfModifyingTitans(config).eval()
        with torch.no_grad():
            growth, cells, sizes = (
                _decode_all(name, layer, tokens) if full else _alternate(layer, config, tokens, rounds)
            )
        report.rows.append([name, *cells, f"{growth:.2f}x", *(f"{s / 1024:,.0f}" for s in sizes)])
        if not quick:
            report.verdicts.append(
                Verdict(f"{name}: time a token after {tokens:,} over early", growth, FLAT, at_least=False)
            )
            report.verdicts.append(
                Verdict(f"{name}: state size, same comparison", sizes[1] / sizes[0], FLAT, at_least=False)
            )
    cache = 2 * WIDTH * 4 * tokens / 1024
    report.notes.append(
        f"a key-value cache of this width ({HEADS} heads, float32) holds {cache:,.0f} KiB after {tokens:,} tokens"
    )
    return report


def _alternate(
    layer: SelfModifyingTitans, config: SelfModifyingConfig, tokens: int, rounds: int
) -> tuple[float, list[str], tuple[int, int]]:
    early = _read(layer, None, BLOCK)
    late = _read(layer, early, tokens - tokens % config.chunk_size)
    block = _inputs(BLOCK, seed=1)
    subjects = [
        Subject("early", _decode(layer, early, block), BLOCK),
        Subject("late", _decode(layer, late, block), BLOCK),
    ]
    timings = interleave(subjects, rounds)
    growth = 1 / speed_ratio(timings[1], timings[0]).median
    return growth, [f"{1e3 * t.median / BLOCK:.2f}" for t in timings], (early.nbytes, late.nbytes)


def _decode_all(name: str, layer: SelfModifyingTitans, tokens: int) -> tuple[float, list[str], tuple[int, int]]:
    state = _read(layer, None, BLOCK)
    first_bytes = state.nbytes
    block = _inputs(BLOCK, seed=1)
    seconds = []
    for _ in track(range(tokens // BLOCK), description=f"decoding {tokens:,} tokens, {name}", transient=True):
        start = time.perf_counter()
        state = _decode_block(layer, state, block)
        seconds.append((time.perf_counter() - start) / BLOCK)
    tenth = max(len(seconds) // 10, 1)
    ends = [statistics.median(seconds[:tenth]), statistics.median(seconds[-tenth:])]
    return ends[1] / ends[0], [f"{1e3 * s:.2f}" for s in ends], (first_bytes, state.nbytes)


def _read(layer: SelfModifyingTitans, state: State | None, tokens: int) -> State:
    """The state after reading `tokens` tokens in parallel, a few thousand at a time."""
    for at in range(0, tokens, 4096):
        _, state = layer(_inputs(min(4096, tokens - at), seed=at), state)
    assert state is not None
    return state


def _decode(layer: SelfModifyingTitans, state: State, block: Tensor) -> Callable[[], State]:
    return lambda: _decode_block(layer, state, block)


def _decode_block(layer: SelfModifyingTitans, state: State, block: Tensor) -> State:
    for token in block.split(1, dim=1):
        _, state = layer(token, state)
    return state


def _inputs(tokens: int, seed: int) -> Tensor:
    return torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
