"""A pre-trained model reads books and a language it does not know: frozen, or learning with levels, LoRA or all of it.

    python -m reproductions reading --model PATH --texts FILE ... --validation FILE FILE [--tokens 6144]
        [--wikitext FILE] [--lambada FILE] [--choices FILE ... --items 100] [--measures 8]
    python -m reproductions reading --model PATH --texts FILE ... --rate 1e-4 --methods NAME ...

Texts are UTF-8 files (of Project Gutenberg's books the text alone) or a dictionary's examples in CLDF (.csv), read as
lines `sentence = translation`. --tokens of each are read, and those after them are held out. Losses are prequential:
every token is scored before anything is learned from it. Parts:

    rates      the validation stream, and nothing else
    alone      every text from the base model
    sequence   two texts one after the other (--sequence FILE FILE; the first and the last of --texts), with the
               held-out parts after each, the first text's first tokens again, WikiText, LAMBADA and multiple choice
    ablations  the best of cms_2, cms_3 and cms_4 (or --ablate NAME) with one option each, or several joined by +
               (--options even+projection), in sequence

Methods: frozen, frozen_long and frozen_longest (contexts of --context, of --long and of as many tokens as the model was
trained with); one_level, cms_2, cms_3, cms_4 (all MLPs, by depth, the top fastest, periods of 1, 4, 16 and 64 chunks,
rates times period^-0.5); lora (rank 8 on all linear layers but the head); full (every parameter). All learn by AdamW
from chunks of --chunk tokens. A method of levels may have options, as one_level+taught.

The learning rate is the best of 3e-5, 1e-4, 3e-4, 1e-3 (and on, until the best is inside) on the two texts of
--validation, read one after the other. The criterion, against the frozen model and lower is better, is half learning,
the mean of both texts' second halves while they are read, and half keeping, the held-out part of the first text after
the second. An option of an ablation has its base's rate or the next higher of the grid, whichever is better there;
ranks and other rates of the slow levels have the whole grid. Of several options the rate is that of the last one with
all before it as its base.

A run that is interrupted goes on from where it was ten minutes earlier at most (a file in the folder cache beside the
results; not with --measures). `--quick` is a tiny random model and invented texts.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from nestling.evaluation.choices import Question
from nestling.models.pretrained import load_pretrained
from nestling.training.tokenization import byte_tokenizer
from reproductions.harness.command import Reproduction
from reproductions.harness.machine import add_machine_arguments, use_machine
from reproductions.harness.rows import Rows
from reproductions.harness.stream_methods import ABLATIONS, METHODS, method_of
from reproductions.harness.tiny import tiny_llama
from reproductions.reading.experiment import Experiment, Judges, Sizes, Text, encode, make_judges, make_text
from reproductions.reading.report import STACKS, make_report

PARTS = ("rates", "alone", "sequence", "ablations")


class Plan:
    """Which texts are read by which methods.

    Args:
        made: the runs.
        texts: for `alone`.
        pair: for `sequence`.
        validation: likewise, for the rates; None where `rate` is given.
        ablate: the method whose options are tried; None is the best of `STACKS`.
        rate: of all that is run; None is each method's best on the validation stream.
    """

    def __init__(
        self,
        made: Experiment,
        texts: list[Text],
        pair: tuple[Text, Text],
        validation: tuple[Text, Text] | None,
        ablate: str | None,
        rate: float | None = None,
    ) -> None:
        self.made, self.texts, self.pair, self.validation, self.ablate = made, texts, pair, validation, ablate
        self.rate = rate

    def run(self, methods: list[str], parts: list[str], options: list[str]) -> None:
        """All that is not there yet."""
        for method in methods:
            rate = self._rate(method)
            if "sequence" in parts:
                self.made.sequence(method, rate, *self.pair)
            if "alone" in parts:
                for text in self.texts:
                    self.made.alone(method, rate, text)
        if "ablations" in parts:
            base = self.ablate or min(STACKS, key=lambda name: self.made.criterion(name, *self.validation))
            for option in options:
                method = f"{base}+{option}"
                self.made.sequence(method, self._rate(method), *self.pair)

    def _rate(self, method: str) -> float:
        """The given one, measured on the validation stream like the others where there is one, or the best there."""
        if _still(method):
            return 0.0
        if self.rate is None:
            assert self.validation is not None
            return self.made.chosen(method, *self.validation)
        if self.validation is not None:
            self.made.validation(method, self.rate, *self.validation)
        return self.rate


def _still(method: str) -> bool:
    return method_of(method).learned == "nothing"


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Every method and two options on a tiny random model, at one rate."""
    tokenizer = byte_tokenizer()
    sizes = Sizes(tokens=64, held=16, again=16, chunk=16, context=32, long=64)
    lines = ["the river ran past the mill and on to the sea. ", "ma tok konatnin. ", "kewe me leng. ", "rain fell. "]
    texts = [
        Text(f"text {i}", ids[:64], ids[64:80]) for i, ids in enumerate(encode(tokenizer, 9 * s, 80) for s in lines)
    ]
    question = Question(("rain",) * 2, ("fell.", "ran."), 0)
    judges = Judges(texts[2].held, [("the river ran past the", "mill")], {"questions": [question]})
    made = Experiment(tiny_llama(4, args.device), tokenizer, "tiny", sizes, judges, rows, measure_every=2)
    plan = Plan(made, texts[:2], (texts[0], texts[1]), (texts[2], texts[3]), "cms_3")
    for method in (*METHODS, "cms_3+gate", "cms_3+sleep"):
        rate = 0.0 if _still(method) else 1e-3
        made.validation(method, rate, texts[2], texts[3])
        made.sequence(method, rate, *plan.pair)
        if method in ("frozen", "cms_3"):
            for text in plan.texts:
                made.alone(method, rate, text)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the texts, the judges, the methods."""
    parser.add_argument("--model", help="Hugging Face folder or name, or a GGUF file")
    parser.add_argument("--texts", nargs="+", type=Path, default=[])
    parser.add_argument("--sequence", nargs=2, type=Path, metavar="FILE")
    parser.add_argument("--validation", nargs=2, type=Path, metavar="FILE")
    parser.add_argument("--tokens", type=int, help="read of every text (default: all)")
    parser.add_argument("--validation-tokens", type=int, help="read of each of --validation (default: --tokens)")
    parser.add_argument("--held", type=int, default=2048, help="tokens held out of every text, and read again")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--long", type=int, default=2048, help="context of frozen_long")
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--wikitext-tokens", type=int, default=4096)
    parser.add_argument("--lambada", type=Path)
    parser.add_argument("--choices", nargs="*", type=Path, default=[])
    parser.add_argument("--items", type=int, default=100, help="of LAMBADA and every set of choices")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), metavar="METHOD[+OPTION]")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--ablate", choices=("one_level", *STACKS))
    parser.add_argument("--options", nargs="*", default=list(ABLATIONS), metavar="OPTION[+OPTION]")
    parser.add_argument(
        "--rate", type=float, help="in place of the best on the validation stream, which may be left out"
    )
    parser.add_argument("--measures", type=int, metavar="N", help="record the levels' measures every N chunks")
    parser.add_argument("--seed", type=int, default=0)
    add_machine_arguments(parser)


def check(args: argparse.Namespace) -> None:
    """What a run needs.

    Raises:
        SystemExit: something of it is missing, or an unknown method.
    """
    try:
        for name in (*args.methods, *(f"{args.ablate or STACKS[0]}+{option}" for option in args.options)):
            method_of(name)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if args.validation is None and args.rate is None:
        raise SystemExit("--validation FILE FILE is needed, which the rates are chosen on, or --rate (or --quick)")
    if args.model is None or not args.texts:
        raise SystemExit("--model PATH and --texts FILE ... are needed (or --quick)")
    if args.validation is None and args.parts == ["rates"]:
        raise SystemExit("--validation FILE FILE is needed for the part rates")
    if args.validation is None and args.ablate is None and "ablations" in args.parts:
        raise SystemExit("--ablate NAME is needed without --validation, which would choose it")


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Rates and runs."""
    check(args)
    use_machine(args)
    model, tokenizer = load_pretrained(args.model)
    model.to(args.device)
    sizes = Sizes(args.tokens, args.held, args.held, args.chunk, args.context, args.long)
    judges = make_judges(tokenizer, args.wikitext, args.lambada, args.choices, args.wikitext_tokens, args.items)
    made = Experiment(model, tokenizer, Path(args.model).name, sizes, judges, rows, args.measures, args.seed)
    pair = args.sequence or [args.texts[0], args.texts[-1]]
    known = {path: make_text(path, tokenizer, sizes) for path in dict.fromkeys([*args.texts, *pair])}
    rated = replace(sizes, tokens=args.validation_tokens or args.tokens)
    validation = [make_text(path, tokenizer, rated) for path in args.validation or []]
    texts = [known[path] for path in args.texts]
    two = (validation[0], validation[1]) if validation else None
    plan = Plan(made, texts, (known[pair[0]], known[pair[1]]), two, args.ablate, args.rate)
    plan.run(args.methods, args.parts, args.options)


REPRODUCTION = Reproduction(run, make_report, quick, arguments)
