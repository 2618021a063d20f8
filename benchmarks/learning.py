"""What learning while reading costs a pre-trained model: time and memory of a `Learner`, by option.

The model has SmolLM2-135M's shape and random weights, which change neither. Every option is measured in a process of
its own, `python -m benchmarks.learning NAME ROUNDS THREADS QUICK`, in turns with reading the same tokens frozen.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import Report
from benchmarks.resident import in_own_process, peak, reset_peak
from benchmarks.timing import Subject, interleave, speed_ratio
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.options import Gate, Options, Rehearsal, Replay, UpdateLimit
from nestling.models import convert
from reproductions.harness.stream_methods import read_frozen

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
QUICK_SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
VOCABULARY, QUICK_VOCABULARY = 49152, 512
CHUNK, CONTEXT = 256, 512
TOKENS = 2 * CHUNK
"""Of a measured step: the slower level is updated once in it."""
OPTIONS: dict[str, tuple[int, Options]] = {
    "one level": (1, Options()),
    "two levels": (2, Options()),
    "retention 0.98": (2, Options(retention=0.98)),
    "limit": (2, Options(limit=UpdateLimit(relative=3e-4))),
    "gate by token": (2, Options(gate=Gate(quantile=0.3))),
    "replay": (2, Options(replay=Replay(weight=0.5))),
    "projection": (2, Options(replay=Replay(weight=0.0, projection=True))),
    "rank 16": (2, Options(rank=16)),
    "average": (1, Options(average=16 * CHUNK)),
    "average that teaches": (1, Options(average=16 * CHUNK, replay=Replay(teacher="average"))),
    "rehearsal": (1, Options(rehearsal=Rehearsal(pieces=8))),
    "bfloat16": (1, Options(bfloat16=True)),
}
"""Number of levels, and what else."""


@dataclass(frozen=True)
class Cost:
    """Of one option.

    Attributes:
        tokens_per_second: learned, at the median.
        times: reading alone takes, median and range over rounds, as text.
        learned: parameters.
        added: bytes at the peak above the model alone.
    """

    tokens_per_second: float
    times: str
    learned: int
    added: int


def measure_here(name: str, rounds: int, quick: bool) -> Cost:
    """The cost of one of `OPTIONS` in this process; call it once a process."""
    torch.manual_seed(0)
    count, options = OPTIONS[name]
    shape, vocabulary = (QUICK_SHAPE, QUICK_VOCABULARY) if quick else (SHAPE, VOCABULARY)
    heads = {"num_key_value_heads": 3, "tie_word_embeddings": True}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape, **heads)).eval()
    periods = {f"level_{i + 1}": CHUNK * 2**i for i in range(count)}
    model = convert(base, periods)
    del base
    ids = torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(0))
    read_frozen(model, ids, CONTEXT)  # thread pools and workspaces are no learner's
    before = reset_peak()
    learner = Learner(model, lr=1e-5, context=CONTEXT, options=options)
    learn = Subject("learn", lambda: learner.observe(ids), TOKENS)
    learn.step()
    added = peak() - before
    read = Subject("read", lambda: read_frozen(model, ids, CONTEXT), TOKENS)
    reading, learning = interleave([read, learn], rounds)
    # How often the time of reading fits: the ratio of speeds, the other way round.
    times = speed_ratio(reading, learning)
    learned = sum(p.numel() for weights in learner.weights.values() for p in weights.learned)
    return Cost(learning.tokens_per_second, str(times), learned, added)


def measure(name: str, rounds: int, quick: bool, threads: int) -> Cost:
    """`measure_here` in a new process."""
    return Cost(**json.loads(in_own_process("benchmarks.learning", name, rounds, threads, int(quick))))


def learning(rounds: int, quick: bool, threads: int) -> Report:
    """All options."""
    columns = ["learning", "tokens/s", "time, reading alone is 1", "parameters learned", "peak MiB above the model"]
    report = Report("Learning while reading: a model of SmolLM2-135M's shape", columns)
    for name in list(OPTIONS)[:2] if quick else OPTIONS:
        cost = measure(name, rounds, quick, threads)
        found = [
            f"{cost.tokens_per_second:,.1f}",
            cost.times,
            f"{cost.learned / 1e6:.1f}M",
            f"{cost.added / 2**20:,.0f}",
        ]
        report.rows.append([name, *found])
    report.notes.append(
        f"AdamW, all MLPs, chunks of {CHUNK}, context {CONTEXT}; options as `Options` names them, with two levels down "
        "to rank 16, and one below"
    )
    return report


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(vars(measure_here(sys.argv[1], int(sys.argv[2]), sys.argv[4] == "1"))))
