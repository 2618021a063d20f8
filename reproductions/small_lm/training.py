"""One training of a small language model on books, in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from nestling.evaluation.language import evaluate_loss
from nestling.tasks.text import strip_gutenberg
from nestling.training import TrainConfig, train
from nestling.training.config import CONFIG_FILE
from nestling.training.tokenization import encode_text

SHAPE: dict[str, Any] = {"hidden_size": 192, "num_heads": 3}
TINY_SHAPE: dict[str, Any] = {"hidden_size": 32, "num_heads": 1, "num_layers": 1}
SAVE_EVERY = 500  # steps between two checkpoints: minutes of a training that was interrupted are trained again
LENGTH, BATCH = 512, 2  # few rows: at this budget every preset gains more from steps than from a steadier gradient


@dataclass(frozen=True)
class Training:
    """Settings of one.

    Attributes:
        preset, rate, seed, tokens: likewise.
        overrides: of the preset, beside its shape.
        shape: width and heads.
    """

    preset: str
    rate: float
    seed: int
    tokens: int
    overrides: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=lambda: SHAPE)

    def run(self, out: Path, data: Sequence[str], valid: Sequence[str], *, apart: bool = True) -> dict[str, Any]:
        """`result.json` of the run in a folder, trained now unless it is finished (from its last checkpoint, where it
        was interrupted); `apart`, in a process of its own.
        """
        if not (out / "result.json").exists():
            config = {
                "out": str(out), "preset": self.preset, "overrides": self.shape | self.overrides, "data": list(data),
                "valid": list(valid), "tokens": self.tokens, "sequence_length": LENGTH, "batch_size": BATCH,
                "learning_rate": self.rate, "seed": self.seed, "eval_every": 10**6, "save_every": SAVE_EVERY,
                "keep_checkpoints": 1, "sample_tokens": 0, "tensorboard": False,
            }  # fmt: skip
            _call("train", json.dumps(config), apart=apart)
        result: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
        return result


def loss_on(out: Path, book: str, tokens: int, *, apart: bool = True) -> float:
    """Nats per byte of a trained model on the beginning of a book."""
    return _call("test", str(out), book, str(tokens), apart=apart)


def books(paths: Sequence[Path], folder: Path) -> list[str]:
    """Copies without the publisher's notes; bytes that are not UTF-8 (one book has some) become replacement characters.

    Raises:
        SystemExit: no books given, or one that does not exist.
    """
    if not paths or None in paths:
        raise SystemExit("give books of Project Gutenberg with --train, --valid and --test (or --quick)")
    place = folder / "work" / "books"
    place.mkdir(parents=True, exist_ok=True)
    for book in paths:
        if not book.is_file():
            raise SystemExit(f"no book at {book}; give a text file")
        text = book.read_text(encoding="utf-8-sig", errors="replace")
        (place / book.name).write_text(strip_gutenberg(text), encoding="utf-8")
    return [str(place / book.name) for book in paths]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Books, tokens, processes."""
    parser.add_argument("--train", type=Path, nargs="+", metavar="BOOK", help="books of Project Gutenberg")
    parser.add_argument("--tokens", type=int, default=400_000, help="of training, in bytes")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.set_defaults(shape=SHAPE, apart=True)


def quicken(args: argparse.Namespace) -> None:
    """Arguments of a run of seconds: two invented books and a tiny shape."""
    place = args.folder / "invented"
    place.mkdir()
    for name in ("a.txt", "b.txt"):
        (place / name).write_text("the river ran past the mill and on to the sea.\n" * 150, encoding="utf-8")
    args.train, args.valid, args.test = [place / "a.txt"], place / "b.txt", place / "b.txt"
    args.tokens, args.shape, args.jobs, args.apart = 2048, TINY_SHAPE, 1, False


def _call(what: str, *words: str, apart: bool) -> float:
    """The number that `main` gives; in a process of one thread, so that several trainings share the machine."""
    if not apart:
        return main([what, *words])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    code = "import sys, reproductions.small_lm.training as t; print(t.main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, what, *words]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"a run failed:\n{done.stderr[-3000:]}")
    return float(done.stdout.strip().splitlines()[-1])


def main(words: Sequence[str]) -> float:
    """`train CONFIG`: seconds of a training; `test RUN BOOK TOKENS`: loss of a trained model on a book."""
    torch.set_num_threads(1)
    if words[0] == "train":
        config = TrainConfig(**json.loads(words[1]))
        begun = (Path(config.out) / CONFIG_FILE).is_file()
        return float(train(config, resume=begun, console=Console(stderr=True)).seconds)
    run, book, limit = words[1:]
    text = Path(book).read_text(encoding="utf-8")
    ids = encode_text(AutoTokenizer.from_pretrained(run), text)[: int(limit)]
    model = AutoModelForCausalLM.from_pretrained(run).eval()
    return float(evaluate_loss(model, ids, LENGTH, carry=False).loss)
