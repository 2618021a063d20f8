"""What is measured: texts read alone and one after the other, each by a method at a rate."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.continual.learner.guards import LearningDivergedError
from nestling.evaluation.choices import (
    Question,
    ask_last_words,
    ask_questions,
    read_last_words,
    read_questions,
)
from nestling.evaluation.language import loss_by_position
from nestling.tasks.text import read_documents, strip_gutenberg
from nestling.tasks.translation import as_text, read_cldf_pairs
from reproductions.harness.grid import best_rate, fixed, grow_rate, next_rate
from reproductions.harness.machine import hardware
from reproductions.harness.rows import Row, Rows
from reproductions.harness.stream_methods import StreamModel, method_of
from reproductions.reading.progress import Progress, State

OWN_RATES = ("rank", "even", "rising")
"""Options that change what a rate means."""
CHARACTERS = 8
"""Of a text are encoded for each token that is wanted; more where that is too few."""


@dataclass(frozen=True)
class Text:
    """A text to be read, and what follows it.

    Attributes:
        name: of its file.
        ids: `[n]`, read.
        held: `[h]`, the tokens after those, never learned from.
    """

    name: str
    ids: Tensor
    held: Tensor


@dataclass
class Judges:
    """What else a model is asked, before and after.

    Attributes:
        wikitext: tokens to score, or None.
        lambada: texts and last words.
        choices: questions by set.
    """

    wikitext: Tensor | None = None
    lambada: list[tuple[str, str]] = field(default_factory=list)
    choices: dict[str, list[Question]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens, part of every result's key.

    Attributes:
        tokens: read of every text; None is all.
        held: of the part held out.
        again: of a text's beginning that are read again.
        chunk: period of the fastest level.
        context: of every method but `frozen_long` and `frozen_longest`.
        long: of that.
    """

    tokens: int | None = None
    held: int = 2048
    again: int = 2048
    chunk: int = 256
    context: int = 512
    long: int = 2048


def read_text(path: Path) -> str:
    """A book without its publisher's notes, or a dictionary's examples (.csv) as lines `sentence = translation`."""
    if path.suffix == ".csv":
        return as_text(read_cldf_pairs(path))
    return strip_gutenberg(read_documents(path)[0].text)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int | None) -> Tensor:
    """The first `tokens` tokens of a text."""
    share = len(text) if tokens is None else CHARACTERS * tokens
    ids = tokenizer(text[:share], add_special_tokens=False)["input_ids"]
    if tokens is not None and len(ids) < tokens and share < len(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[:tokens], dtype=torch.long)


def make_text(path: Path, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> Text:
    """A text cut into what is read and what is held out; a short one is held out by a fourth at most."""
    wanted = None if sizes.tokens is None else sizes.tokens + sizes.held
    ids = encode(tokenizer, read_text(path), wanted)
    border = len(ids) - min(sizes.held, len(ids) // 4)
    if sizes.tokens is not None:
        border = min(border, sizes.tokens)
    # Whole chunks: after an unfinished one the learners would read the next text with other contexts than the frozen.
    border -= border % sizes.chunk if border >= sizes.chunk else 0
    return Text(path.stem, ids[:border], ids[border:])


def make_judges(
    tokenizer: PreTrainedTokenizerBase,
    wikitext: Path | None,
    lambada: Path | None,
    choices: Sequence[Path],
    tokens: int,
    items: int,
) -> Judges:
    """The first tokens of WikiText and the first items of every set."""
    return Judges(
        None if wikitext is None else encode(tokenizer, read_documents(wikitext)[0].text, tokens),
        [] if lambada is None else read_last_words(lambada, items),
        {path.stem: read_questions(path, items) for path in choices},
    )


class Experiment:
    """All runs on one model.

    Args:
        model: pre-trained; every learner gets a copy.
        tokenizer: its own.
        name: of the model, for the results.
        sizes: see there.
        judges: asked after two texts.
        results: where finished runs are.
        measure_every: chunks between two records of the levels' measures.
        seed: of whatever a method draws.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        sizes: Sizes,
        judges: Judges,
        results: Rows,
        measure_every: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.name, self.sizes = model, tokenizer, name, sizes
        self.judges, self.results, self.measure_every, self.seed = judges, results, measure_every, seed

    def key(self, part: str, method: str, rate: float, texts: Sequence[Text]) -> dict[str, Any]:
        """What names a run."""
        key = {"part": part, "model": self.name, "method": method, "rate": rate, "texts": [t.name for t in texts]}
        if part == "sequence":
            wikitext = 0 if self.judges.wikitext is None else len(self.judges.wikitext)
            sets = {name: len(questions) for name, questions in self.judges.choices.items()}
            key["judges"] = {"wikitext": wikitext, "lambada": len(self.judges.lambada)} | sets
        key["read"] = [len(t.ids) for t in texts]
        return key | {"sizes": asdict(self.sizes), "seed": self.seed}

    def alone(self, method: str, rate: float, text: Text) -> Row:
        """One text from the base model."""
        return self._get("alone", method, rate, [text])

    def sequence(self, method: str, rate: float, first: Text, second: Text) -> Row:
        """Two texts one after the other, and everything else that is asked."""
        return self._get("sequence", method, rate, [first, second])

    def validation(self, method: str, rate: float, first: Text, second: Text) -> Row:
        """Likewise, with the criterion instead."""
        return self._get("validation", method, rate, [first, second])

    def chosen(self, method: str, first: Text, second: Text) -> float:
        """The rate of the lowest criterion on the validation stream, on a grid that grows until it is inside.

        An option's rate is its base method's or the next one, whichever is better; of `OWN_RATES`, from the whole grid.
        """
        kind = method_of(method)
        if kind.learned == "nothing":
            return 0.0

        def measure(rate: float) -> float:
            return float(self.validation(method, rate, first, second)["criterion"])

        base, _, option = method.rpartition("+")
        if not base or option in OWN_RATES:
            return best_rate(grow_rate(measure))
        best = self.chosen(base, first, second)
        return best_rate(grow_rate(measure, (best, next_rate(best, up=True)), fixed))

    def criterion(self, method: str, first: Text, second: Text) -> float:
        """Of the chosen rate."""
        return float(self.validation(method, self.chosen(method, first, second), first, second)["criterion"])

    def _get(self, part: str, method: str, rate: float, texts: Sequence[Text]) -> Row:
        key = self.key(part, method, rate, texts)
        known = self.results.find(key)
        row = self.results.get(key, lambda: self._run(key, part, method, rate, texts))
        if known is None:
            told = " ".join(f"{half:.3f}" for half in row["second_halves"])
            print(f"{part} {method} lr {rate:.3g}: second halves {told}, {row['seconds']:.0f} s", flush=True)
        return row

    def _run(self, key: Row, part: str, method: str, rate: float, texts: Sequence[Text]) -> Row:
        measured = self.measure_every if part == "sequence" else None
        reader = StreamModel(
            self.model,
            method_of(method),
            rate,
            chunk=self.sizes.chunk,
            context=self.sizes.context,
            long=self.sizes.long,
            seed=self.seed,
            measure_every=measured,
        )
        found: Row = {"diverged": False, "second_halves": [], "curves": [], "held": []}
        progress = Progress(self._unfinished(key) if measured is None else None, State(found))
        try:
            progress.resume(reader)
            row = progress.state.row
            for number in range(len(row["curves"]), len(texts)):
                self._read(reader, texts[number], progress)
                if part == "sequence":
                    self._held_out(reader, texts[: number + 1], row)
            row["learning_seconds"] = round(progress.state.reading, 1)
            if part == "validation":
                row["held"].append([reader.score(texts[0].held)])
                row["criterion"] = self._criterion(row, method, texts)
            if part == "sequence":
                row |= self._judged(reader, texts[0])
        except LearningDivergedError:
            row = {"diverged": True, "criterion": math.inf, "second_halves": [math.inf] * len(texts)}
        finally:
            reader.close()
        row["skipped"], row["measures"] = reader.skipped, reader.records
        row["seconds"], row["hardware"] = round(progress.close(), 1), hardware(self.model.device)
        return row

    def _unfinished(self, key: Row) -> Path:
        """Where the run of a key is kept until it is finished."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        return self.results.path.parent / "cache" / f"{name}.safetensors"

    def _held_out(self, reader: StreamModel, texts: Sequence[Text], row: Row) -> None:
        """Of the texts read so far; once more with the running mean, where there is one."""
        row["held"].append([reader.score(t.held) for t in texts])
        with reader.averaged() as kept:
            if kept:
                row.setdefault("mean_held", []).append([reader.score(t.held) for t in texts])

    def _read(self, reader: StreamModel, text: Text, progress: Progress) -> None:
        row, losses = progress.state.row, progress.read(reader, text.ids)[1:]
        bins = loss_by_position(losses, max(1, len(text.ids) // self.sizes.chunk))
        row["curves"].append([[b.stop for b in bins], [round(b.loss, 4) for b in bins]])
        row["second_halves"].append(float(losses[len(losses) // 2 :].double().mean()))

    def _criterion(self, row: Row, method: str, texts: Sequence[Text]) -> float:
        """Half learning and half keeping, both against the frozen model; lower is better, 0 for that.

        Learning: the second halves of both texts while they are read, mean. Keeping: the held-out part of the first
        text after the second.
        """
        if method == "frozen":
            return 0.0
        frozen = self.validation("frozen", 0.0, *texts)
        halves = zip(row["second_halves"], frozen["second_halves"], strict=True)
        learning = sum(own - other for own, other in halves) / len(texts)
        value = (learning + row["held"][-1][0] - frozen["held"][-1][0]) / 2
        return float(value) if math.isfinite(value) else math.inf

    def _judged(self, reader: StreamModel, first: Text) -> Row:
        """What the model knows at the end."""
        found: Row = {"again": reader.score(first.ids[: self.sizes.again])}
        if self.judges.wikitext is not None:
            found["wikitext"] = reader.score(self.judges.wikitext)
            with reader.averaged() as kept:
                if kept:
                    found["mean_wikitext"] = reader.score(self.judges.wikitext)
        if self.judges.lambada:
            found["lambada"] = asdict(ask_last_words(reader.model, self.tokenizer, self.judges.lambada))
        found["choices"] = {
            name: asdict(ask_questions(reader.model, self.tokenizer, questions))
            for name, questions in self.judges.choices.items()
        }
        return found
