"""Where the time of a step goes: self-modifying Titans with MLP memories and momentum, forward and backward."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import Report
from benchmarks.subjects import mlp_config, titans_subject
from benchmarks.timing import Subject

# Part -> the operations that belong to it, by the profiler's names. Compiled ones include the Python around the call.
PARTS = {
    "all chunks, compiled": ("_Loop", "_LoopBackward"),
    "normalisation and convolution, compiled": ("_Normalize", "_NormalizeBackward", "_ShortConv", "_ShortConvBackward"),
    "projections of the layer": ("aten::mm", "aten::addmm"),
}
REST = "everything else: autograd, rates, copies"


def breakdown(rounds: int, quick: bool) -> Report:
    """Milliseconds of one step by part, medians of the rounds."""
    time = 1024 if quick else 4096
    torch.manual_seed(0)
    subject = titans_subject("MLP memories, momentum, chunk 64", mlp_config(), time)
    subject.step()
    found = [_one_step(subject) for _ in range(rounds)]
    report = Report(f"Where the time goes: {subject.name}, T = {time:,}, under the profiler", ["part", "ms", "share"])
    medians = {part: median(step[part] for step in found) for part in (*PARTS, REST)}
    total = sum(medians.values())
    report.rows = [[part, f"{ms:.0f}", f"{ms / total:.0%}"] for part, ms in medians.items()]
    report.rows.append(["all", f"{total:.0f}", ""])
    return report


def _one_step(subject: Subject) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        subject.step()
    part_of = {name: part for part, names in PARTS.items() for name in names}
    spent: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        spent[part_of.get(event.key, REST)] += event.self_cpu_time_total / 1e3
    return spent
