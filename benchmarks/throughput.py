"""Tokens per second, forward and backward: against softmax attention, and against the public Titans implementation."""

from __future__ import annotations

import torch

from benchmarks.report import Report, Verdict
from benchmarks.subjects import (
    CHUNK,
    attention_subject,
    matrix_config,
    mlp_config,
    neural_memory_subject,
    public_subject,
    titans_subject,
)
from benchmarks.timing import Subject, interleave, matmul_gflops, speed_ratio
from nestling.ops.native.build import library

MATRIX, MLP = "matrix memories, chunk 64", "MLP memories, momentum, chunk 64"
# Sequence length -> goals for (matrix memories, MLP memories), as multiples of attention's tokens per second.
GOALS = {4096: (1.0, 0.7), 16384: (3.0, 2.5)}
COLUMNS = ["forward + backward, batch 1", "T", "tokens/s", "ratio", "GFLOP/token", "GFLOP/s", "share of peak"]


def against_attention(rounds: int, quick: bool) -> Report:
    """Self-modifying Titans against causal attention with its projections at the same shape."""
    report = Report("Self-modifying Titans against causal softmax attention (width 256, 4 heads, float32)", COLUMNS)
    peak = matmul_gflops()
    for time, goals in {1024: (None, None)}.items() if quick else GOALS.items():
        subjects = [
            attention_subject(time),
            titans_subject(MATRIX, matrix_config(), time),
            titans_subject(MLP, mlp_config(), time),
        ]
        if time == 4096:
            subjects.append(titans_subject(f"{MATRIX}, torch.compile", matrix_config(compiled=True), time))
            subjects.append(titans_subject(f"{MLP}, torch.compile", mlp_config(compiled=True), time))
        _compare(report, subjects, dict(zip((MATRIX, MLP), goals, strict=True)), rounds, peak)
    report.notes.append(f"peak: a 1,024 x 1,024 float32 matrix product runs at {peak:.0f} GFLOP/s here")
    report.notes.append("ratio: tokens/s over the first row of the same T, median (lowest to highest) of the rounds")
    how = "in C++ (nestling.ops.native)" if library() else "through torch, since there is no compiled kernel"
    report.notes.append(f"chunks run {how}; torch.compile: compile_chunks=True instead, compilation not counted")
    report.notes.append("GFLOP: necessary operations only, see benchmarks/flops.py")
    return report


def against_public(rounds: int, quick: bool) -> Report:
    """One Titans neural memory against titans-pytorch at the same chunk, width, head width, depth and expansion."""
    report = Report("One Titans neural memory (MLP, depth 2, momentum) against titans-pytorch", COLUMNS)
    peak = matmul_gflops()
    # titans-pytorch grows slower per token with T, so T matters; at chunk 16 a step takes 7 GB and half a minute.
    for chunk, time, goal in ((64, 512, None), (16, 128, None)) if quick else ((64, 4096, 4.0), (16, 4096, 6.0)):
        ours = f"ours, chunk {chunk}"
        subjects = [
            public_subject(f"titans-pytorch, chunk {chunk}", chunk, time),
            neural_memory_subject(ours, chunk, time),
        ]
        _compare(report, subjects, {ours: goal}, rounds, peak)
    time = 128 if quick else 512
    ours = f"ours, chunk {CHUNK}, per token"
    public = public_subject(f"titans-pytorch, chunk {CHUNK}, per token", CHUNK, time, gradient_chunk=1)
    _compare(report, [public, neural_memory_subject(ours, CHUNK, time)], {}, rounds, peak)
    report.notes.append(
        "titans-pytorch runs with batch_size = chunk, and with chunk_size = chunk (one averaged gradient and one read "
        "weight a chunk, its cheapest setting) unless the row says per token; ours always gives every token its own"
    )
    return report


def _compare(report: Report, subjects: list[Subject], goals: dict[str, float | None], rounds: int, peak: float) -> None:
    """Rows and verdicts of `subjects` against the first of them."""
    torch.manual_seed(0)
    timings = interleave(subjects, rounds)
    for timing in timings:
        subject = timing.subject
        ratio = speed_ratio(timing, timings[0])
        cells = ["", "", ""]
        if subject.flops is not None and timing.gflops is not None:
            cells = [
                f"{subject.flops / subject.tokens / 1e9:.4f}",
                f"{timing.gflops:.1f}",
                f"{timing.gflops / peak:.0%}",
            ]
        shown = "1" if timing is timings[0] else str(ratio)
        report.rows.append([subject.name, f"{subject.tokens:,}", f"{timing.tokens_per_second:,.0f}", shown, *cells])
        if (goal := goals.get(subject.name)) is not None:
            what = f"{subject.name}, T = {subject.tokens:,}, tokens/s over {timings[0].subject.name}"
            report.verdicts.append(Verdict(what, ratio.median, goal))
