"""How fast a study reads: against reading once with a `Learner`, and against peft's LoRA on exercises of the same text.

The model has SmolLM2-135M's shape and random weights, which change no time. In turns, step by step: a step of a study,
a step of peft's LoRA on as many of the exercises, and a chunk of a learner at its defaults. What is prepared before a
study (text of the model's own, its moments, the scope) is left out here; `nestling study` tells its speed with it.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from contextlib import suppress

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.learning import CHUNK, CONTEXT, QUICK_SHAPE, QUICK_VOCABULARY, SHAPE, VOCABULARY
from benchmarks.report import Report, Verdict
from benchmarks.timing import Subject, Timing, speed_ratio
from nestling.continual import Learner, Options, Rehearsal
from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.scoring import Reader
from nestling.continual.study.lessons import make_lessons, tell
from nestling.continual.study.settings import Study
from nestling.continual.study.studying import Events, Step
from nestling.tasks.knowledge import make_world
from nestling.training.tokenization import train_bpe
from reproductions.harness.lora import add_lora

RANK = 16
WARM_UP = 2  # steps of each that are not counted
WORDS = 2000  # of the tokenizer: names and common words are a token or two, as of a pre-trained one


class _Enough(Exception):
    """All rounds are measured."""


class Turns:
    """What is called after every step of a study, and times the others.

    Args:
        others: a step of each, which says how many tokens it read.
        rounds: to be measured.
    """

    def __init__(self, others: dict[str, Callable[[], int]], rounds: int) -> None:
        self.others, self.rounds = others, rounds
        self.seconds: dict[str, list[float]] = {name: [] for name in ("study", *others)}
        self.tokens: dict[str, list[int]] = {name: [] for name in self.seconds}
        self.begun = time.perf_counter()

    def __call__(self, step: Step) -> None:
        """A step was taken."""
        self._took("study", step.tokens)
        for name, run in self.others.items():
            self.begun = time.perf_counter()
            self._took(name, run())
        if len(self.tokens["study"]) == self.rounds + WARM_UP:
            raise _Enough
        self.begun = time.perf_counter()

    def timing(self, name: str) -> Timing:
        """Seconds for as many tokens as its steps have on average."""
        seconds, tokens = self.seconds[name][WARM_UP:], self.tokens[name][WARM_UP:]
        mean = round(sum(tokens) / len(tokens))
        each = tuple(mean * second / count for second, count in zip(seconds, tokens, strict=True))
        return Timing(Subject(name, lambda: None, mean), each)

    def _took(self, name: str, tokens: int) -> None:
        self.seconds[name].append(time.perf_counter() - self.begun)
        self.tokens[name].append(tokens)


def study_throughput(rounds: int, quick: bool, threads: int) -> Report:
    """Tokens a second of a study, of peft's LoRA and of a learner."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    texts = {d.name: d.text for d in make_world(3 if quick else 20).documents}
    size = QUICK_VOCABULARY if quick else VOCABULARY
    tokenizer = train_bpe(texts.values(), min(WORDS, size))
    shape = (QUICK_SHAPE if quick else SHAPE) | {"num_key_value_heads": 3, "tie_word_embeddings": True}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=size, **shape)).eval()
    pieces = [lesson.piece for lesson in make_lessons(tell(list(texts.values())), tokenizer, CONTEXT)]
    turns = Turns({"lora": _lora(base, pieces), "learn": _learning(base, size)}, rounds)
    learner = Learner(base, lr=1e-3, options=Options(rank=RANK, rehearsal=Rehearsal(8, 96, weight=0.0)))
    # No word is rare to a vocabulary of a few hundred.
    settings = Study(rounds=1000, kinds=0, others=0, everywhere=quick)
    with suppress(_Enough):
        learner.study(texts, tokenizer, settings, Events(step=turns))
    return _report(turns, quick)


def _lora(base: PreTrainedModel, pieces: list[Piece]) -> Callable[[], int]:
    """Eight pieces a step, in one padded pass, AdamW."""
    model, rng = add_lora(copy.deepcopy(base), RANK), random.Random(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, reader = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.95)), Reader(model)

    def step() -> int:
        chosen = rng.sample(pieces, Study.batch)
        reader.losses(chosen).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return sum(len(piece.ids) for piece in chosen)

    return step


def _learning(base: PreTrainedModel, size: int) -> Callable[[], int]:
    """A chunk of a text."""
    learner = Learner(copy.deepcopy(base), lr=1e-5, context=CONTEXT)
    ids = torch.randint(size, (CHUNK,), generator=torch.Generator().manual_seed(0))
    return lambda: len(learner.observe(ids).losses)


def _report(turns: Turns, quick: bool) -> Report:
    study, lora, learn = (turns.timing(name) for name in ("study", "lora", "learn"))
    report = Report("Studying: a model of SmolLM2-135M's shape", ["what", "tokens/s", "study's tokens/s over it"])
    report.rows.append(["study", f"{study.tokens_per_second:,.1f}", ""])
    for name, timing in (("peft's LoRA, in all linear layers", lora), ("learn, all MLPs", learn)):
        report.rows.append([name, f"{timing.tokens_per_second:,.1f}", str(speed_ratio(study, timing))])
    if not quick:
        of_learn, of_lora = (speed_ratio(study, each).median for each in (learn, lora))
        report.verdicts.append(Verdict("tokens/s of study over those of learn", of_learn, 2.5))
        report.verdicts.append(Verdict("time of study over that of peft's LoRA", 1 / of_lora, 1.3, at_least=False))
    report.notes.append(
        f"rank {RANK}, {Study.batch} exercises a step; a chunk of {CHUNK} tokens with a context of {CONTEXT}"
    )
    return report
