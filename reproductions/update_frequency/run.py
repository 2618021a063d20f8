"""Update frequency: levels that step by a clock against levels that step when their gradients agree.

A small byte-level Transformer++ is trained on books, then a learner reads another book and learns from it. Every level
steps after a fixed number of tokens, or as soon as the signal-to-noise ratio of its mean gradient is high enough
(`nestling.optim.noise_scale`). Compared is the loss while reading, each byte before it was learned from, beside the
number of updates that it took. Every arm has its own rate of AdamW, chosen on a book that is not reported.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from nestling.continual import Learner, Level, Options
from nestling.continual.stream.scoring import read_frozen
from nestling.training.tokenization import byte_tokenizer
from reproductions.harness.command import Reproduction
from reproductions.harness.rows import Row, Rows
from reproductions.small_lm import training
from reproductions.update_frequency.report import CHUNK, make_report

LONGEST = 32
"""Chunks that a level with a ratio waits at most."""
PERIODS = (1, 2, 4, 8, 16)
RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
SEEDS = (0, 1, 2)
RATE_OF_BASE = 1.5e-3
LEVELS = {"one level": 1, "two levels": 2}


class Experiment:
    """All arms.

    Args:
        args: of the command line.
        rows: finished ones.
    """

    def __init__(self, args: argparse.Namespace, rows: Rows) -> None:
        self.args, self.rows = args, rows
        self.data = training.books(args.train, args.folder)
        self.valid, self.test, self.other = training.books([args.valid, args.test, args.other], args.folder)

    def base(self, seed: int) -> Path:
        """A trained model."""
        place = Path(self.args.folder / "work" / f"base-{seed}-{self.args.tokens}")
        made = training.Training("transformer", RATE_OF_BASE, seed, self.args.tokens, shape=self.args.shape)
        made.run(place, self.data, [self.valid], apart=self.args.apart)
        return place

    def arm(self, levels: str, when: str, value: float) -> None:
        """Its rate, and then all seeds with that."""
        key = {"levels": levels, "when": when, "value": value, "tokens": self.args.tokens}
        losses = {
            rate: self.reading(key | {"part": "validation", "rate": rate, "seed": 0}, self.valid, self.args.tune)[
                "loss"
            ]
            for rate in self.args.rates
        }
        rate = min(losses, key=lambda each: losses[each])
        for seed in self.args.seeds:
            self.reading(key | {"part": "test", "rate": rate, "seed": seed}, self.test, self.args.read)

    def reading(self, key: Row, book: str, length: int) -> Row:
        """A learner that reads a book."""
        key |= {"book": Path(book).name, "read": length}

        def made() -> Row:
            row = self._read(key, ids_of(book, length))
            print(f"{key}: {row['loss']:.4f}, {row['updates']}", flush=True)
            return row

        return self.rows.get(key, made)

    def _read(self, key: Row, ids: torch.Tensor) -> Row:
        model = AutoModelForCausalLM.from_pretrained(self.base(key["seed"]))
        base = float(read_frozen(model, ids, 2 * CHUNK)[1:].mean())
        longest = LONGEST if key["when"] == "ratio" else int(key["value"])
        levels = levels_of(model, LEVELS[key["levels"]], CHUNK * longest)
        ratio = key["value"] if key["when"] == "ratio" else None
        options = Options(chunk=CHUNK, signal_to_noise=ratio, seed=key["seed"])
        learner = Learner(model, levels, lr=key["rate"], rate_exponent=0.0, context=2 * CHUNK, options=options)
        updates = dict.fromkeys(levels, 0)
        losses = []
        for part in ids.split(CHUNK):
            seen = learner.observe(part)
            losses.append(seen.losses)
            for name in seen.updated:
                updates[name] += 1
        other = read_frozen(model, ids_of(self.other, self.args.tune), 2 * CHUNK)
        return {
            "loss": float(torch.cat(losses)[1:].mean()),
            "frozen": base,
            "other": float(other[1:].mean()),
            "updates": updates,
            "periods": learner.mean_periods,
        }


def levels_of(model: torch.nn.Module, count: int, period: int) -> dict[str, Level]:
    """All MLPs as one level, or those of the upper and of the lower half of the blocks."""
    names = [name for name, _ in model.named_parameters() if ".channel." in name]
    blocks = list(dict.fromkeys(name.split(".channel.")[0] for name in names))
    parts = (
        {"all": blocks} if count == 1 else {"upper": blocks[len(blocks) // 2 :], "lower": blocks[: len(blocks) // 2]}
    )
    return {
        part: Level(period, tuple(n for n in names if n.split(".channel.")[0] in own))
        for part, own in parts.items()
        if own
    }


def ids_of(book: str, length: int) -> torch.Tensor:
    """Bytes of its beginning as tokens."""
    return torch.tensor(byte_tokenizer()(Path(book).read_text(encoding="utf-8")[:length]).input_ids[:length])


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Every arm."""
    experiment = Experiment(args, rows)
    for levels in args.levels:
        for period in args.periods:
            experiment.arm(levels, "clock", period)
        for ratio in args.ratios:
            experiment.arm(levels, "ratio", ratio)


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Two arms on an invented book."""
    training.quicken(args)
    args.other, args.tune, args.read = args.test, 600, 1200
    args.levels, args.periods, args.ratios, args.rates, args.seeds = ["one level"], [2], [1.0], [1e-3], [0]
    run(args, rows)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Books, arms."""
    training.arguments(parser)
    parser.add_argument("--valid", type=Path, metavar="BOOK", help="on which rates are chosen")
    parser.add_argument("--test", type=Path, metavar="BOOK", help="that is read and reported")
    parser.add_argument("--other", type=Path, metavar="BOOK", help="foreseen afterwards, to see what was forgotten")
    parser.add_argument("--tune", type=int, default=24_576, help="bytes read to choose rates")
    parser.add_argument("--read", type=int, default=98_304, help="bytes read and reported")
    parser.add_argument("--levels", nargs="*", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument("--periods", nargs="*", type=int, default=list(PERIODS))
    parser.add_argument("--ratios", nargs="*", type=float, default=list(RATIOS))
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))


REPRODUCTION = Reproduction(run, make_report, quick, arguments)
