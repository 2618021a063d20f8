"""All sequence mixers side by side, and the linear family against flash-linear-attention's naive chunked references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peak_memory import measure
from benchmarks.public import fla_naive
from benchmarks.report import Report, Verdict
from benchmarks.subjects import (
    CHUNK,
    HEADS,
    LINEAR_FAMILY,
    MIXERS,
    WIDTH,
    attention_subject,
    mixer_layer,
    mixer_subject,
)
from benchmarks.timing import Subject, Timing, interleave, matmul_gflops, speed_ratio
from nestling.layers.sequence import SequenceLayer
from nestling.ops import chunk_rule, native

LENGTHS = (1024, 4096, 16384)
JUDGED = 4096
GOAL = 1.5
COUNTED = (512, 1024)  # lengths whose operations are counted, beyond every window
COLUMNS = [
    "width 256, float32",
    "forward",
    "ratio",
    "forward + backward",
    "ratio",
    "peak MiB",
    "GFLOP/token",
    "of peak",
]


def all_mixers(rounds: int, quick: bool, threads: int) -> list[Report]:
    """One table a length: tokens per second, peak memory, share of the peak; then decoding."""
    peak = matmul_gflops()
    lengths = LENGTHS[:1] if quick else LENGTHS
    return [_at_length(time, rounds, quick, threads, peak) for time in lengths] + [_decoding(rounds, quick)]


def _at_length(time: int, rounds: int, quick: bool, threads: int, peak: float) -> Report:
    report = Report(f"All mixers, T = {time:,}, tokens/s, batch 1", COLUMNS)
    torch.manual_seed(0)
    forwards = [_forward("attention", attention_subject(time), time)]
    forwards += [_forward(name, mixer_layer(name), time) for name in MIXERS]
    forward = interleave(forwards, rounds)
    both = interleave([attention_subject(time), *(mixer_subject(name, time) for name in MIXERS)], rounds)
    for ahead, whole in zip(forward, both, strict=True):
        name = whole.subject.name
        whole = _counted(whole, time)
        ratio = speed_ratio(whole, both[0])
        report.rows.append(
            [
                name,
                f"{ahead.tokens_per_second:,.0f}",
                "1" if ahead is forward[0] else f"{speed_ratio(ahead, forward[0]).median:.2f}x",
                f"{whole.tokens_per_second:,.0f}",
                "1" if name == "attention" else str(ratio),
                f"{measure(name, time, threads) / 2**20:,.0f}",
                f"{(whole.subject.flops or 0) / time / 1e9:.4f}",
                f"{(whole.gflops or 0) / peak:.0%}",
            ]
        )
        if time == JUDGED and not quick and name in LINEAR_FAMILY:
            what = f"{name}, T = {time:,}, forward + backward, tokens/s over attention"
            report.verdicts.append(Verdict(what, ratio.median, GOAL))
    report.notes.append("MiB: by which a step raises the resident set")
    report.notes.append(f"peak: a 1,024 x 1,024 float32 matrix product runs at {peak:.0f} GFLOP/s here")
    report.notes.append(
        "GFLOP: matrix products without fusion, chunk by chunk, forward + backward, masked squares in full"
    )
    return report


def _forward(name: str, layer: Subject | SequenceLayer, time: int) -> Subject:
    """The forward pass alone, without a graph."""
    x = torch.randn(1, time, WIDTH)
    if isinstance(layer, Subject):
        assert layer.module is not None
        module: Callable[[Tensor], object] = layer.module
    else:
        module = layer

    def step() -> None:
        with torch.no_grad():
            module(x)

    return Subject(name, step, time)


def _counted(timing: Timing, time: int) -> Timing:
    """The timing with the operations of its subject.

    Counted at two short lengths: full attention grows as a T + b T^2, every other mixer by the same amount a token once
    its window is full.
    """
    name = timing.subject.name
    short, long = COUNTED
    one, two = (_count(name, length) for length in COUNTED)
    if name in ("attention", "transformer"):
        square = (two / long - one / short) / (long - short)
        flops = (one / short - square * short) * time + square * time**2
    else:
        flops = one + (two - one) / (long - short) * (time - short)
    return replace(timing, subject=replace(timing.subject, flops=flops))


@cache
def _count(name: str, time: int) -> float:
    subject = attention_subject(time) if name == "attention" else mixer_subject(name, time)
    # Neither compiled code nor fused attention is counted, and the parallel schedule does more than it has to.
    with (
        patch.object(native, "fits", lambda *_: False),
        patch.object(chunk_rule, "_scan_parallel", chunk_rule._scan_sequential),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        subject.step()
    return float(counter.get_total_flops())


def _decoding(rounds: int, quick: bool) -> Report:
    """One token at a time after a text."""
    before, block = (256, 64) if quick else (4096, 128)
    columns = ["one token at a time, batch 1", "ms a token", "ratio", f"state KiB after {before:,}"]
    report = Report("All mixers, decoding", columns)
    subjects, sizes = [], []
    with torch.no_grad():
        for name in MIXERS:
            layer = mixer_layer(name).eval()
            _, state = layer(torch.randn(1, before, WIDTH))
            sizes.append(state.nbytes)
            tokens = torch.randn(1, block, WIDTH)

            def step(layer: SequenceLayer = layer, first: object = state, tokens: Tensor = tokens) -> None:
                state = first
                for token in tokens.split(1, dim=1):
                    _, state = layer(token, state)

            subjects.append(Subject(name, step, block))
        timings = interleave(subjects, rounds)
    for timing, size in zip(timings, sizes, strict=True):
        ratio = "1" if timing is timings[0] else str(speed_ratio(timing, timings[0]))
        report.rows.append([timing.subject.name, f"{1e3 * timing.median / block:.2f}", ratio, f"{size / 1024:,.0f}"])
    report.notes.append("ratio: tokens/s over softmax attention's, whose state and work grow with the text")
    return report


def against_naive(rounds: int, quick: bool) -> Report:
    """`chunk_scan` against the naive chunked references at the same chunk, forward and backward, no projections."""
    time = 512 if quick else JUDGED
    columns = ["forward + backward, 4 heads of 64", "T", "tokens/s", "ratio"]
    report = Report("The linear family against flash-linear-attention's naive chunked PyTorch references", columns)
    for name, (ours, public) in _cores(time).items():
        timings = interleave(
            [Subject(f"flash-linear-attention, {name}", public, time), Subject(f"ours, {name}", ours, time)], rounds
        )
        for timing in timings:
            ratio = speed_ratio(timing, timings[0])
            shown = "1" if timing is timings[0] else str(ratio)
            report.rows.append([timing.subject.name, f"{time:,}", f"{timing.tokens_per_second:,.0f}", shown])
        if not quick:
            report.verdicts.append(Verdict(f"ours, {name}, T = {time:,}, tokens/s over theirs", ratio.median, GOAL))
    return report


def _cores(time: int) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """Pairs of steps, ours and theirs, on the same numbers.

    Raises:
        ImportError: flash-linear-attention's references are not installed.
    """
    torch.manual_seed(0)
    width = WIDTH // HEADS
    q, k, v = (torch.randn(1, HEADS, time, width, requires_grad=True) for _ in range(3))
    rate, log_a = torch.rand(1, HEADS, time, requires_grad=True), -0.1 * torch.rand(1, HEADS, time)
    log_a.requires_grad_()
    leaves = (q, k, v, rate, log_a)
    weight = torch.zeros(1, HEADS, width, width)
    linear, delta, gated, simple = (
        fla_naive(n) for n in ("linear_attn", "delta_rule", "gated_delta_rule", "simple_gla")
    )
    if linear is None or delta is None or gated is None or simple is None:
        raise ImportError("fla-core is not installed; pip install -e '.[dev]'")

    def turned(*tensors: Tensor) -> list[Tensor]:  # theirs takes [B, T, H, D], but for the delta rule
        return [t.transpose(1, 2) for t in tensors]

    def ours(erase: bool, retention: bool, unit: bool = True) -> Tensor:
        key = F.normalize(k, dim=-1) if unit else k
        e = rate * log_a.exp() if erase and retention else rate if erase else None
        log_retention, lr = log_a if retention else None, rate if erase else None
        return chunk_rule.chunk_scan(
            key, -v, q, weight=weight, chunk_size=CHUNK, log_retention=log_retention, erase=e, inner_lr=lr
        )[0]

    def step(run: Callable[[], Tensor]) -> Callable[[], None]:
        def once() -> None:
            for leaf in leaves:
                leaf.grad = None
            run().sum().backward()

        return once

    def key() -> Tensor:
        return F.normalize(k, dim=-1)

    return {
        "linear attention": (
            step(lambda: ours(False, False, unit=False)),
            step(lambda: linear.naive_chunk_linear_attn(*turned(q, k, v))),
        ),
        "scalar retention": (
            step(lambda: ours(False, True, unit=False)),
            step(lambda: simple.naive_chunk_simple_gla(*turned(q, k, v, log_a), chunk_size=CHUNK)[0]),
        ),
        "delta rule": (
            step(lambda: ours(True, False)),
            step(lambda: delta.delta_rule_chunkwise(q, key(), v, rate, chunk_size=CHUNK)[0]),
        ),
        "gated delta rule": (
            step(lambda: ours(True, True)),
            step(lambda: gated.naive_chunk_gated_delta_rule(*turned(q, key(), v, log_a, rate), chunk_size=CHUNK)[0]),
        ),
    }
