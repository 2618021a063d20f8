"""Two languages that a model does not know, one after the other: translation into English (NL Figure 8, small scale).

    python -m reproductions figure8 --model PATH --flores DIR --measure [--kalamang FILE]
    python -m reproductions figure8 --model PATH --flores DIR --kalamang FILE --second NAME
        --validation NAME NAME [--tokens 6144] [--test 64] [--measures 8]

--measure says how well the frozen model knows each language of FLORES (and Kalamang): bits per byte of its sentences,
to choose --second by (the paper's second language, Manchu, is not at hand).

Training pairs are read as lines `sentence = translation`, one after the other as one text of --tokens tokens; every
token is learned from (--scored answers: the English side only). Kalamang's test pairs are --test of a seeded order of
all examples and share no sentence with training; so are the second language's, of FLORES devtest. A question has the
last training pairs before it, as many as --ask-context tokens hold. So the learned models have the same examples in
their context as the frozen one (in-context learning, the paper's baseline), and after two languages those of the
second only, which is where in-context learning forgets the first.

Methods: icl (frozen), level_1, level_2 and level_3: so many levels learn, all MLPs by depth, periods of 1, 4 and 16
chunks of 256 tokens, rates times period^-0.5, AdamW. The rate is the best of 3e-5, 1e-4, 3e-4, 1e-3 (and on, until the
best is inside) on two other languages of --validation, of FLORES dev, learned one after the other: the mean loss of
both languages' English sides at the end, so that learning the second and keeping the first count equally.

`--quick` is a tiny random model and invented languages.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.continual.learner.guards import LearningDivergedError
from nestling.continual.stream.scoring import read_frozen
from nestling.evaluation.language import LossReport
from nestling.evaluation.translation import EncodedPairs, encode_pairs, score_translations
from nestling.models import NestlingForCausalLM, convert
from nestling.tasks.translation import Pair, read_aligned_pairs, read_cldf_pairs, split_pairs
from nestling.training.tokenization import byte_tokenizer
from reproductions.figure8.report import criterion, make_report
from reproductions.harness.command import Reproduction
from reproductions.harness.grid import best_rate, grow_rate
from reproductions.harness.machine import add_machine_arguments, hardware
from reproductions.harness.rows import Row, Rows
from reproductions.harness.stream_methods import METHODS, StreamModel, period_names
from reproductions.harness.tiny import tiny_llama

NAMES = {"icl": "frozen", "level_1": "one_level", "level_2": "cms_2", "level_3": "cms_3"}
"""Of the methods here, and in `METHODS`."""
ENGLISH = "eng_Latn"


@dataclass(frozen=True)
class Language:
    """Pairs of one language.

    Attributes:
        name: for the results.
        train: as a stream.
        test: asked for.
    """

    name: str
    train: EncodedPairs
    test: list[Pair]


@dataclass(frozen=True)
class Sizes:
    """Part of every result's key.

    Attributes:
        tokens: of training pairs, of every language.
        test: pairs.
        chunk: period of the fastest level.
        context: of learning.
        ask_context: of a question with its examples and answer.
        max_tokens: of an answer.
        scored: what is learned from, "all" or "answers".
    """

    tokens: int = 6144
    test: int = 64
    chunk: int = 256
    context: int = 512
    ask_context: int = 1024
    max_tokens: int = 96
    scored: str = "all"


class Experiment:
    """All runs on one model.

    Args:
        model: pre-trained, Llama-like; every run gets a copy.
        tokenizer: its own.
        name: of the model.
        sizes: see there.
        rows: finished runs.
        measure_every: chunks between two records of the levels' measures.
        seed: of whatever a method draws.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        sizes: Sizes,
        rows: Rows,
        measure_every: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.name, self.sizes = model, tokenizer, name, sizes
        self.rows, self.measure_every, self.seed = rows, measure_every, seed

    def key(self, part: str, method: str, rate: float, languages: list[Language]) -> dict[str, Any]:
        """What names a run."""
        key = {"part": part, "model": self.name, "method": method, "rate": rate}
        return key | {"languages": [x.name for x in languages], "sizes": asdict(self.sizes), "seed": self.seed}

    def get(self, part: str, method: str, rate: float, languages: list[Language]) -> Row:
        """The run, made now unless it is there."""
        key = self.key(part, method, rate, languages)
        known = self.rows.find(key)
        row = self.rows.get(key, lambda: self._run(part, method, rate, languages))
        if known is None:
            print(f"{part} {method} lr {rate:.3g}: {_told(row['scores'][-1])}, {row['seconds']:.0f} s", flush=True)
        return row

    def chosen(self, method: str, languages: list[Language]) -> float:
        """The rate with the lowest mean loss of both validation languages after both."""
        if method == "icl":
            return 0.0
        return best_rate(grow_rate(lambda rate: criterion(self.get("validation", method, rate, languages))))

    def _run(self, part: str, method: str, rate: float, languages: list[Language]) -> Row:
        """Learn the languages in turn; after each all that were learned are asked for."""
        still = method == "icl"
        # Converted, since the state after the examples is to be continued by every question.
        base = convert(self.model, period_names(1, self.sizes.chunk)) if still else self.model
        measures = self.measure_every if part == "sequence" else None
        sizes = {"chunk": self.sizes.chunk, "context": self.sizes.context, "seed": self.seed}
        reader = StreamModel(base, METHODS[NAMES[method]], rate, measure_every=measures, **sizes)
        start, learning, scores = time.perf_counter(), 0.0, []
        try:
            for number, language in enumerate(languages, 1):
                began = time.perf_counter()
                if not still:
                    scored = language.train.answers if self.sizes.scored == "answers" else None
                    reader.read(language.train.ids, scored)
                learning += time.perf_counter() - began
                if part != "validation" or number == len(languages):
                    asked = languages[:number]
                    scores.append([self._ask(reader, x, language, part != "validation") for x in asked])
        except LearningDivergedError:
            scores = [[{"language": x.name, "loss": math.inf, "chrf": 0.0} for x in languages]]
        finally:
            reader.close()
        row: Row = {"scores": scores, "skipped": reader.skipped, "measures": reader.records}
        tokens = sum(len(x.train.ids) for x in languages)
        row |= {"tokens": tokens, "learning_seconds": learning, "seconds": time.perf_counter() - start}
        return row | {"hardware": hardware(self.model.device)}

    def _ask(self, reader: StreamModel, language: Language, last: Language, generate: bool) -> Row:
        """Scores of one language, with examples of the last one."""
        assert isinstance(reader.model, NestlingForCausalLM)
        sizes = {"context": self.sizes.ask_context, "max_tokens": self.sizes.max_tokens}
        found = score_translations(reader.model, self.tokenizer, language.test, last.train, generate=generate, **sizes)
        return {"language": language.name, "examples_of": last.name} | asdict(found)


def measure(made: Experiment, sentences: dict[str, list[str]]) -> None:
    """Bits per byte of every language's sentences under the frozen model."""
    for name, lines in sentences.items():
        text = "\n".join(lines)

        def run(text: str = text) -> Row:
            ids = torch.tensor(made.tokenizer(text, add_special_tokens=False)["input_ids"])
            losses = read_frozen(made.model, ids, made.sizes.context)[1:]
            report = LossReport(float(losses.double().mean()), len(losses), len(text.encode()))
            found = {"loss": report.loss, "tokens": report.tokens, "bits_per_byte": report.bits_per_byte}
            return found | {"hardware": hardware(made.model.device)}

        made.rows.get({"part": "measure", "model": made.name, "language": name, "sentences": len(lines)}, run)


def make_language(made: Experiment, name: str, pairs: list[Pair], seed: int) -> Language:
    """A language with its pairs split."""
    train, test = split_pairs(pairs, made.sizes.test, seed)
    return Language(name, encode_pairs(made.tokenizer, train, made.sizes.tokens), test)


def flores(folder: Path, name: str, part: str) -> list[Pair]:
    """Pairs of a language of FLORES with English."""
    return read_aligned_pairs([folder / f"{name}.{part}"], [folder / f"{ENGLISH}.{part}"])


def run_all(made: Experiment, methods: list[str], pair: list[Language], validation: list[Language]) -> None:
    """Both languages in sequence, which has the first alone on its way, and the second alone."""
    for method in methods:
        rate = made.chosen(method, validation)
        made.get("sequence", method, rate, pair)
        made.get("alone", method, rate, pair[1:])


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Every method on a tiny random model and two invented languages, at one rate."""
    sizes = Sizes(tokens=160, test=3, chunk=16, context=32, ask_context=64, max_tokens=4)
    words, draw = ["sun", "sea", "rain", "hill", "tree", "bird"], random.Random(0)
    made = Experiment(tiny_llama(3, args.device), byte_tokenizer(), "tiny", sizes, rows, 2)
    languages = []
    for index, ending in enumerate(("ka", "mo", "ti", "lu")):
        sentences = [draw.sample(words, 2) for _ in range(20)]
        pairs = [Pair(" ".join(w[::-1] + ending for w in s), " ".join(s)) for s in sentences]
        languages.append(make_language(made, f"language {index}", list(dict.fromkeys(pairs)), 0))
    measure(made, {x.name: [p.source for p in x.test] for x in languages})
    for method in NAMES:
        rate = 0.0 if method == "icl" else 1e-3
        made.get("validation", method, rate, languages[2:])
        made.get("sequence", method, rate, languages[:2])
        made.get("alone", method, rate, languages[1:2])


def arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the languages, the sizes."""
    parser.add_argument("--model", help="Hugging Face folder or name, or a GGUF file")
    parser.add_argument("--flores", type=Path, help="folder of NAME.dev and NAME.devtest")
    parser.add_argument("--kalamang", type=Path, help="the dictionary's examples, cldf_examples.csv")
    parser.add_argument("--second", help="second language, as eus_Latn")
    parser.add_argument("--validation", nargs=2, metavar="NAME")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--sentences", type=int, default=40, help="of every language for --measure")
    parser.add_argument("--methods", nargs="*", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--tokens", type=int, default=6144, help="of training pairs of every language")
    parser.add_argument("--test", type=int, default=64, help="pairs asked for")
    parser.add_argument("--scored", choices=("all", "answers"), default="all")
    parser.add_argument("--ask-context", type=int, default=1024)
    parser.add_argument("--measures", type=int, metavar="N", help="record the levels' measures every N chunks")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the methods")
    add_machine_arguments(parser)


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Measure, or rates and runs."""
    wanted = ["model", "flores"] + ([] if args.measure else ["kalamang", "second", "validation"])
    if missing := [name for name in wanted if getattr(args, name) is None]:
        raise SystemExit(f"--{', --'.join(missing)} is needed (or --quick)")
    model, tokenizer = given_model(args)
    sizes = Sizes(tokens=args.tokens, test=args.test, ask_context=args.ask_context, scored=args.scored)
    made = Experiment(model, tokenizer, Path(args.model).name, sizes, rows, args.measures, args.seed)
    if args.measure:
        names = sorted(path.stem for path in args.flores.glob("*.devtest"))
        sentences = {n: (args.flores / f"{n}.devtest").read_text(encoding="utf-8").splitlines() for n in names}
        if args.kalamang is not None:
            sentences["Kalamang"] = [pair.source for pair in read_cldf_pairs(args.kalamang)]
        measure(made, {name: lines[: args.sentences] for name, lines in sentences.items()})
        return
    pair = [
        make_language(made, "Kalamang", read_cldf_pairs(args.kalamang), args.seed),
        make_language(made, args.second, flores(args.flores, args.second, "devtest"), args.seed),
    ]
    validation = [make_language(made, n, flores(args.flores, n, "dev"), args.seed) for n in args.validation]
    run_all(made, args.methods, pair, validation)


def _told(scores: list[Row]) -> str:
    chrf = [f", chrF {s['chrf']:.1f}" if s["chrf"] is not None else "" for s in scores]
    return "; ".join(f"{s['language']} loss {s['loss']:.3f}{c}" for s, c in zip(scores, chrf, strict=True))


REPRODUCTION = Reproduction(run, make_report, quick, arguments)
