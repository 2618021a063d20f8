"""A process that computes when it is told to, for `benchmarks.contention`.

    python -m benchmarks.worker torch|native|busy

It says `ready`, and then answers every line `SECONDS CPUS` with the steps it made in a second.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

SUBJECTS = ("torch", "native")


def main() -> None:
    """Prepare, warm up, and answer until the input ends."""
    step = busy_step() if sys.argv[1] == "busy" else training_step(sys.argv[1])
    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, cpus = line.split()
        stay_on(int(cpus))
        print(rate(step, float(seconds)), flush=True)


def training_step(subject: str) -> Callable[[], object]:
    """A forward and a backward pass of a tiny model: with torch's products, or with this library's C++ loop."""
    import torch

    from nestling import NestlingForCausalLM, presets

    torch.manual_seed(0)
    make = {"torch": presets.transformer, "native": presets.hope}[subject]
    model = NestlingForCausalLM(make(size="tiny", vocab_size=259))
    ids = torch.randint(0, 259, (4, 256))  # half of what `nestling train` reads at once: the slowest setting ends too

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return step


def busy_step() -> Callable[[], object]:
    """One thread that never waits."""
    return lambda: sum(range(20_000))


def rate(step: Callable[[], object], seconds: float) -> float:
    """Steps a second, of as many as begin within `seconds`."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        count += 1
    return count / (time.perf_counter() - began)


def stay_on(cpus: int) -> None:
    """Keep all threads to the first so many processors of those this process began with.

    OpenMP counted the processors when it was loaded and knows nothing of it, as in a container with a quota.
    """
    if not ALL:
        return
    chosen = sorted(ALL)[:cpus]
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), chosen)


ALL = os.sched_getaffinity(0) if sys.platform == "linux" else set()  # elsewhere a process cannot be kept to some

if __name__ == "__main__":
    main()
