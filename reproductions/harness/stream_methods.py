"""Ways for a pre-trained model to read a stream: frozen, or learning with one level, several, LoRA or everything."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from nestling.continual.learner.average import RunningMean
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.options import Gate, Level, Options, Rehearsal, Replay, UpdateLimit
from nestling.continual.stream.scoring import read_frozen
from nestling.levels.assignment import stream_levels
from nestling.models import convert
from nestling.models.conversion import Assignment
from reproductions.harness.level_records import Record, record_levels
from reproductions.harness.lora import add_lora

STEP = 16
"""Chunks that a learner reads at a time; of no consequence for what it learns."""
PERIODS = (1, 4, 16, 64)
"""Of the levels, in chunks, fastest first."""
AVERAGE = 4096
"""Tokens of the running mean."""


@dataclass(frozen=True)
class Method:
    """A way to read a stream.

    Attributes:
        learned: "nothing"; "levels" of the MLPs; "lora": low-rank factors on all linear layers but the head, by peft;
            "everything".
        levels: how many, with the periods 1, 4, 16, 64 chunks.
        assignment: of the MLPs to the levels, see `convert`; by depth the top is fastest.
        long: read with a longer context: "long" as many tokens as a run says, "longest" as the model was trained with.
        options: of the learner.
        sleep: `Learner.consolidate` after every text, with these arguments.
        rate_exponent: of the learner.
        rank: of LoRA; its scale (alpha over rank) is 2.
    """

    learned: Literal["nothing", "levels", "lora", "everything"] = "nothing"
    levels: int = 1
    assignment: Assignment = "depth"
    long: Literal["long", "longest"] | None = None
    options: Options = field(default_factory=Options)
    sleep: dict[str, Any] | None = None
    rate_exponent: float = -0.5
    rank: int = 8


METHODS = {
    "frozen": Method(),
    "frozen_long": Method(long="long"),
    "frozen_longest": Method(long="longest"),
    "one_level": Method("levels", 1),
    "cms_2": Method("levels", 2),
    "cms_3": Method("levels", 3),
    "cms_4": Method("levels", 4),
    "lora": Method("lora"),
    "full": Method("everything"),
}

ABLATIONS: dict[str, dict[str, Any]] = {
    "retention": {"options": {"retention": 0.98}},
    "limit": {"options": {"limit": UpdateLimit(relative=3e-4)}},
    "gate": {"options": {"gate": Gate(by="token", quantile=0.3)}},
    "replay": {"options": {"replay": Replay(weight=0.5)}},
    "projection": {"options": {"replay": Replay(weight=0.0, projection=True)}},
    "taught": {"options": {"average": AVERAGE, "replay": Replay(teacher="average")}},
    "rehearsal": {"options": {"rehearsal": Rehearsal()}},
    "bfloat16": {"options": {"bfloat16": True}},
    "rank": {"options": {"rank": 16}},
    "sleep": {"options": {"replay": Replay(weight=0.5)}, "sleep": {"retention": 0.5, "steps": 10, "rows": 2}},
    "even": {"rate_exponent": 0.0},
    "rising": {"rate_exponent": 0.5},
    "interleaved": {"assignment": "interleaved"},
    "split": {"assignment": "split"},
}
"""What a method of levels can be changed by. `sleep` needs what `replay` keeps, so that is what it is compared with;
`even` and `rising` give slow levels the rate of the fast one or a higher one; `interleaved` and `split` are assignments
other than by depth."""


def method_of(name: str) -> Method:
    """A method by name: one of `METHODS`, or with options of `ABLATIONS`, as `cms_3+replay` or `cms_2+split+even`.

    Raises:
        ValueError: an unknown name.
    """
    base, *options = name.split("+")
    if base not in METHODS or (options and (set(options) - set(ABLATIONS) or METHODS[base].learned != "levels")):
        raise ValueError(
            f"unknown method {name!r}; there are {', '.join(METHODS)}, and those of levels with "
            f"+{', +'.join(ABLATIONS)}"
        )
    method = METHODS[base]
    for option in options:
        change = ABLATIONS[option]
        method = replace(method, **change | {"options": replace(method.options, **change.get("options", {}))})
    return method


class StreamModel:
    """A model that reads by a method. `close` it before another one is made of the same base.

    Args:
        base: pre-trained; unchanged (a copy learns).
        method: how.
        rate: of the fastest level; of no use to a method that learns nothing.
        chunk: tokens of the fastest level's period.
        context: tokens a piece is read with at most.
        long: likewise for methods with `long="long"`.
        seed: of LoRA's first values and the learner's choices.
        measure_every: chunks between two records of the levels' measures; None makes none.

    Attributes:
        model: what reads.
        learner: None if nothing is learned.
        records: of the levels, `{"step": ..., MEASURE: ...}`, a step a chunk.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        method: Method,
        rate: float,
        *,
        chunk: int = 256,
        context: int = 512,
        long: int = 2048,
        seed: int = 0,
        measure_every: int | None = None,
    ) -> None:
        self.method, self.context = method, long if method.long == "long" else context
        if method.long == "longest":
            self.context = _most_positions(base)
        self.learner: Learner | None = None
        self.records: list[Record] = []
        self.model, levels = _prepare(base, method, chunk, seed)
        if method.learned != "nothing":
            # A piece is a chunk or half the context, as where nothing is learned.
            options = replace(method.options, seed=seed)
            self.learner = Learner(
                self.model, levels, lr=rate, rate_exponent=method.rate_exponent, context=context, options=options
            )
        if measure_every is not None and self.learner is not None and method.levels > 1 and options.rank is None:
            names = {level: made.parameters for level, made in self.learner.settings.levels.items()}
            self.records = record_levels(self.model, names, self.learner.optimizer, measure_every)

    def read(
        self,
        ids: Int[Tensor, " n"],
        scored: Bool[Tensor, " n"] | None = None,
        *,
        start: int = 0,
        on_step: Callable[[Float[Tensor, " s"]], None] = lambda losses: None,
    ) -> Float[Tensor, " rest"]:
        """Losses of a text, each token's before anything was learned from it; the text is one document.

        Args:
            ids: `[n]`.
            scored: which tokens are learned from and have a loss; None is all.
            start: tokens that were read already, by a learner whose state is there.
            on_step: called with the losses of what was read since the last call, of whole chunks but at the end.

        Returns:
            `[n - start]`, nats, on the CPU; NaN where there is no loss.
        """
        if self.learner is None:
            losses = read_frozen(self.model, ids, self.context)
            return losses if scored is None else losses.where(scored, math.nan)
        found = []
        for place in range(start, len(ids), STEP * self.learner.stream.chunk):
            part = slice(place, place + STEP * self.learner.stream.chunk)
            found.append(self.learner.observe(ids[part], scored=None if scored is None else scored[part]).losses)
            on_step(found[-1])
        self.learner.end_document()
        if self.method.sleep is not None:
            self.learner.consolidate(**self.method.sleep)
        return torch.cat(found) if found else torch.empty(0)

    def score(self, ids: Int[Tensor, " n"]) -> float:
        """Mean loss of a text in nats a token; nothing is learned."""
        return float(read_frozen(self.model, ids, self.context)[1:].double().mean())

    @contextmanager
    def averaged(self) -> Iterator[bool]:
        """The model with the running mean of its weights; whether the method keeps one."""
        if self.learner is None or self.learner.component(RunningMean) is None:
            yield False
            return
        with self.learner.averaged():
            yield True

    @property
    def skipped(self) -> int:
        """Tokens of chunks that the learner refused."""
        return 0 if self.learner is None else self.learner.counters.skipped

    def close(self) -> None:
        """Detach the learner."""
        if self.learner is not None:
            self.learner.detach()


def _most_positions(model: PreTrainedModel) -> int:
    """The longest context that a model was trained with."""
    found = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(found, int):
        raise ValueError(f"a {type(model).__name__} does not say how many positions it was trained with")
    return found


def period_names(count: int, chunk: int) -> dict[str, int]:
    """The first `count` levels by name, with their periods in tokens."""
    return {f"level_{i + 1}": chunk * period for i, period in enumerate(PERIODS[:count])}


def _prepare(
    base: PreTrainedModel, method: Method, chunk: int, seed: int
) -> tuple[PreTrainedModel, dict[str, Level] | None]:
    """The model that reads, and the levels that learn."""
    if method.learned == "nothing":
        return base, None
    if method.learned == "levels":
        converted = convert(base, period_names(method.levels, chunk), method.assignment)
        assert len(stream_levels(converted)) == method.levels
        return converted, None
    model = copy.deepcopy(base)
    if method.learned == "everything":
        return model, {"all": Level(chunk, ("*",))}
    return add_lora(model, method.rank, seed), {"lora": Level(chunk, ("*lora_A*", "*lora_B*"))}
