"""Peak memory of forward and backward against sequence length.

Every figure is taken in a process of its own: `python -m benchmarks.peak_memory NAME T` prints the bytes by which the
resident set rose above its size before the step.
"""

from __future__ import annotations

import math
import sys

import torch

from benchmarks.report import Report, Verdict
from benchmarks.resident import in_own_process, peak, reset_peak
from benchmarks.subjects import MIXERS, attention_subject, matrix_config, mixer_subject, mlp_config, titans_subject
from benchmarks.timing import Subject

NAMES = ("attention", "matrix", "matrix checkpointed", "mlp", "mlp checkpointed")
LINEAR_SLACK = 1.1  # log-log slope that still counts as linear; quadratic would be 2
BOUND = 2.0  # checkpointed peak over attention's at T = 4,096


def build(name: str, time: int) -> Subject:
    """The subject called `name` (one of `NAMES`, or a preset of `MIXERS`) over `time` tokens."""
    if name == "attention":
        return attention_subject(time)
    if name in MIXERS:
        return mixer_subject(name, time)
    kind, _, mode = name.partition(" ")
    config = matrix_config if kind == "matrix" else mlp_config
    return titans_subject(name, config(checkpoint=bool(mode)), time)


def measure_here(name: str, time: int) -> int:
    """Bytes that one step adds to the resident set of this process; call it once a process."""
    build(name, 128).step()  # thread pools and workspaces are no activations
    subject = build(name, time)
    before = reset_peak()
    subject.step()
    return peak() - before


def measure(name: str, time: int, threads: int) -> int:
    """`measure_here` in a new process.

    Raises:
        RuntimeError: the process failed; the message holds the end of what it said.
    """
    return int(in_own_process("benchmarks.peak_memory", name, time, threads))


def peak_memory(quick: bool, threads: int) -> Report:
    """Peak memory of every subject at several lengths, and its growth."""
    lengths = (512, 1024) if quick else (2048, 4096, 8192, 16384)
    columns = ["peak MiB of forward + backward", *(f"T = {t:,}" for t in lengths), "growth", "over attention"]
    report = Report("Peak memory against sequence length", columns)
    at = lengths[-1] if quick else 4096
    reference = 0
    for name in NAMES:
        peaks = {time: measure(name, time, threads) for time in lengths}
        reference = reference or peaks[at]
        slope = _slope(peaks)
        over = peaks[at] / reference
        report.rows.append([name, *(f"{p / 2**20:,.0f}" for p in peaks.values()), f"T^{slope:.2f}", f"{over:.2f}x"])
        if not quick and name != "attention":
            report.verdicts.append(Verdict(f"{name}: exponent of the growth in T", slope, LINEAR_SLACK, at_least=False))
            if "checkpointed" in name:
                what = f"{name}: peak over attention's at T = {at:,}"
                report.verdicts.append(Verdict(what, over, BOUND, at_least=False))
    report.notes.append(f"growth: exponent between the shortest and the longest T; over attention: at T = {at:,}")
    return report


def _slope(peaks: dict[int, int]) -> float:
    times = sorted(peaks)
    return math.log(peaks[times[-1]] / peaks[times[0]]) / math.log(times[-1] / times[0])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    torch.manual_seed(0)
    print(measure_here(sys.argv[1], int(sys.argv[2])))
