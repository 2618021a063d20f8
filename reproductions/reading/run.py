"""A pre-trained model reads books and a language it does not know: frozen, or learning with levels, LoRA or all of it.

    python -m reproductions reading --model PATH --texts FILE ... --validation FILE FILE [--tokens 6144]
        [--wikitext FILE] [--lambada FILE] [--choices FILE ... --items 100] [--measures 8]
    python -m reproductions reading --model PATH --texts FILE ... --rate 1e-4 --methods NAME ...
    python -m reproductions reading --quick

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

Every finished run is a line of results.jsonl beside this file, and a second call skips what is there, so a run can be
stopped and continued and several processes may share the work (by --methods and --parts). A run that is interrupted
goes on from where it was ten minutes earlier at most (a file in the folder cache beside the results; not with
--measures). The report, table.md and a picture of every text, is written from what is finished with --report, which
runs nothing, or at the end of a run.
`--quick` is a tiny random model and invented texts, and writes nothing.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestling.evaluation.choices import Question
from nestling.models.pretrained import load_pretrained
from nestling.training.tokenization import byte_tokenizer
from reproductions.harness.machine import add_machine_arguments, use_machine
from reproductions.harness.result_file import ResultFile, Row
from reproductions.harness.stream_methods import ABLATIONS, METHODS, method_of
from reproductions.reading.experiment import Experiment, Judges, Sizes, Text, encode, make_judges, make_text
from reproductions.reading.report import write_report

HERE = Path(__file__).parent
PARTS = ("rates", "alone", "sequence", "ablations")
STACKS = ("cms_2", "cms_3", "cms_4")
DRAWN = ("frozen", "frozen_long", "one_level", "{best}", "lora", "full")


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

    def report(self, folder: Path) -> str:
        """Of what is finished."""
        grids = {m: rows for m in self._names() if (rows := self._finished(m))}
        gridded = {m: on for m, rows in grids.items() if (on := [row for row in rows if _on_grid(row["rate"])])}
        rates = {m: 0.0 for m in METHODS if _still(m)} | {m: _best(rows) for m, rows in gridded.items()}
        alone = {m: rows for m, rate in rates.items() if (rows := self._alone(m, rate))}
        sequence = {}
        for method, rate in rates.items():
            if row := self.made.results.find(self.made.key("sequence", method, rate, self.pair)):
                sequence[method] = row
        stacks = {m: min(r["criterion"] for r in gridded[m]) for m in STACKS if m in gridded}
        best = min(stacks, key=lambda m: stacks[m]) if stacks else STACKS[0]
        shown = alone if "frozen" in alone else {}
        drawn = [name.format(best=best) for name in DRAWN]
        return write_report(folder, grids, shown, sequence if "frozen" in sequence else {}, drawn)

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

    def _names(self) -> list[str]:
        """All methods that have a rate, options after what they are options of."""
        found = {row["method"] for row in self.made.results.rows} - set(METHODS)
        return [m for m in (*METHODS, *sorted(found, key=_order)) if not _still(m)]

    def _finished(self, method: str) -> list[Row]:
        if self.validation is None:
            return []
        key = self.made.key("validation", method, 0.0, self.validation)
        del key["rate"]
        return [row for row in self.made.results.rows if all(row.get(k) == v for k, v in key.items())]

    def _alone(self, method: str, rate: float) -> list[Row]:
        found = [self.made.results.find(self.made.key("alone", method, rate, [text])) for text in self.texts]
        rows = [row for row in found if row is not None and not row["diverged"]]
        return rows if len(rows) == len(self.texts) else []


def _still(method: str) -> bool:
    return method_of(method).learned == "nothing"


def _order(method: str) -> list[int]:
    """By base method, then by options as they are listed."""
    base, *options = method.split("+")
    return [list(METHODS).index(base), *(list(ABLATIONS).index(option) for option in options)]


def _on_grid(rate: float) -> bool:
    """A rate that every method tries where its best is near, and not one of --rate between them."""
    return f"{rate:.6e}".split("e")[0] in ("1.000000", "3.000000")


def _best(rows: list[Row]) -> float:
    return float(
        min(rows, key=lambda r: (r["criterion"] if math.isfinite(r["criterion"]) else math.inf, r["rate"]))["rate"]
    )


def quick(device: str) -> None:
    """Every method and two options on a tiny random model, at one rate."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, **shape)).eval()
    model.to(device)
    tokenizer = byte_tokenizer()
    sizes = Sizes(tokens=64, held=16, again=16, chunk=16, context=32, long=64)
    lines = ["the river ran past the mill and on to the sea. ", "ma tok konatnin. ", "kewe me leng. ", "rain fell. "]
    texts = [
        Text(f"text {i}", ids[:64], ids[64:80]) for i, ids in enumerate(encode(tokenizer, 9 * s, 80) for s in lines)
    ]
    question = Question(("rain",) * 2, ("fell.", "ran."), 0)
    judges = Judges(texts[2].held, [("the river ran past the", "mill")], {"questions": [question]})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = ResultFile(folder / "results.jsonl")
        made = Experiment(model, tokenizer, "tiny", sizes, judges, results, measure_every=2)
        plan = Plan(made, texts[:2], (texts[0], texts[1]), (texts[2], texts[3]), "cms_3")
        for method in (*METHODS, "cms_3+gate", "cms_3+sleep"):
            rate = 0.0 if _still(method) else 1e-3
            made.validation(method, rate, *plan.validation)
            made.sequence(method, rate, *plan.pair)
            if method in ("frozen", "cms_3"):
                for text in plan.texts:
                    made.alone(method, rate, text)
        print(plan.report(folder))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    try:
        for name in (*args.methods, *(f"{args.ablate or STACKS[0]}+{option}" for option in args.options)):
            method_of(name)
    except ValueError as error:
        parser.error(str(error))
    if args.validation is None and args.rate is None and not args.quick:
        parser.error("--validation FILE FILE is needed, which the rates are chosen on, or --rate (or --quick)")
    if not args.quick and (args.model is None or not args.texts):
        parser.error("--model PATH and --texts FILE ... are needed (or --quick)")
    if args.validation is None and (args.report or args.parts == ["rates"]) and not args.quick:
        parser.error("--validation FILE FILE is needed for --report and for the part rates")
    if args.validation is None and args.ablate is None and "ablations" in args.parts and not args.quick:
        parser.error("--ablate NAME is needed without --validation, which would choose it")
    return args


def main() -> None:
    """Rates, runs, report."""
    args = parse()
    use_machine(args)
    if args.quick:
        quick(args.device)
        return
    model, tokenizer = load_pretrained(args.model)
    model.to(args.device)
    sizes = Sizes(args.tokens, args.held, args.held, args.chunk, args.context, args.long)
    judges = make_judges(tokenizer, args.wikitext, args.lambada, args.choices, args.wikitext_tokens, args.items)
    made = Experiment(
        model, tokenizer, Path(args.model).name, sizes, judges, ResultFile(args.results), args.measures, args.seed
    )
    pair = args.sequence or [args.texts[0], args.texts[-1]]
    known = {path: make_text(path, tokenizer, sizes) for path in dict.fromkeys([*args.texts, *pair])}
    rated = replace(sizes, tokens=args.validation_tokens or args.tokens)
    validation = [make_text(path, tokenizer, rated) for path in args.validation or []]
    texts = [known[path] for path in args.texts]
    two = (validation[0], validation[1]) if validation else None
    plan = Plan(made, texts, (known[pair[0]], known[pair[1]]), two, args.ablate, args.rate)
    if not args.report:
        plan.run(args.methods, args.parts, args.options)
    if two is not None:
        print(plan.report(args.results.parent))


if __name__ == "__main__":
    main()
