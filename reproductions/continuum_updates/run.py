"""Do the updates of a continuum pay in language? Small models with them and without, at periods shorter than a window.

Every update rule on the same books of Project Gutenberg, in bytes, at one learning rate; losses in nats per byte on a
book that is not trained on, read in windows of the training length and in windows four times as long.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling import NestlingConfig, NestlingForCausalLM, presets
from nestling.tasks.text import strip_gutenberg
from reproductions.harness.command import Reproduction
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row, Rows

LENGTH, BATCH, RATE, BYTES = 512, 2, 3e-3, 32_768
LONGER = 4  # times the training length
SEEDS = (0, 1, 2)
FIRST_BYTE = 3  # the byte tokenizer's
SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "hope_attention": {},
    "hope_attention, window 32": {"window": 32},
    "hope_linear": {},
}
"""Presets, with the arguments that a row's name tells."""
PERIODS = (32, 128, None)
UPDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("three plain MLPs", {"periods": [None] * 3}),
    "token, gain": ("r / period a token, with a gain (the presets')", {"periods": PERIODS, "gain": True}),
    "proximal, gain": ("the period solved, with a gain", {"periods": PERIODS, "step": "proximal", "gain": True}),
    "all": (
        "the same with momentum and retention",
        {"periods": PERIODS, "step": "proximal", "gain": True, "momentum": True, "retention": True},
    ),
}
"""What each is, and the settings of the continuum that make it."""
OLD: dict[str, Any] = {"step": "token", "momentum": False, "retention": False, "gain": False}
"""Settings where none are said."""


def build(name: str, updates: str, shape: dict[str, Any]) -> NestlingForCausalLM:
    """A model of a shape; its channels are as wide as makes the parameters of all equal."""
    settings = dict(UPDATES[updates][1])
    config = presets.PRESETS[name.split(",")[0]](periods=settings.pop("periods"), **MODELS[name] | shape)
    blocks = [block | {"channel": block["channel"] | OLD | settings} for block in config.blocks]
    return NestlingForCausalLM(NestlingConfig(blocks=blocks, hidden_size=config.hidden_size))


def read(paths: Sequence[Path]) -> Tensor:
    """The bytes of books without the publisher's notes.

    Raises:
        SystemExit: no books given, or one that does not exist.
    """
    if not paths or None in paths:
        raise SystemExit("give books of Project Gutenberg with --train and --valid (or --quick)")
    for book in paths:
        if not book.is_file():
            raise SystemExit(f"no book at {book}; give a text file")
    texts = [strip_gutenberg(book.read_text(encoding="utf-8-sig", errors="replace")) for book in paths]
    return torch.tensor(list("".join(texts).encode()), dtype=torch.long) + FIRST_BYTE


def train(model: NestlingForCausalLM, data: Tensor, steps: int, seed: int) -> None:
    """AdamW with warm-up and cosine; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, 10 * (i + 1) / steps) * (0.55 + 0.45 * math.cos(math.pi * i / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        first = torch.randint(len(data) - LENGTH, (BATCH, 1), generator=generator)
        text = data[first + torch.arange(LENGTH + 1)]
        model(text[:, :-1], shift_labels=text[:, 1:], use_cache=False, logits_to_keep=1).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_on(model: NestlingForCausalLM, data: Tensor, length: int) -> float:
    """Nats per byte, in windows that begin afresh."""
    windows = data[: (len(data) - 1) // length * length].reshape(-1, length)
    targets = data[1 : windows.numel() + 1].reshape(-1, length)
    rows = max(1, 4096 // length)
    pairs = zip(windows.split(rows), targets.split(rows), strict=True)
    losses = [(float(model(x, shift_labels=y, use_cache=False, logits_to_keep=1).loss), len(x)) for x, y in pairs]
    return sum(loss * n for loss, n in losses) / len(windows)


def measure(args: argparse.Namespace, name: str, updates: str, seed: int, books: tuple[Tensor, Tensor]) -> Row:
    """One training and its validation."""
    torch.manual_seed(seed)
    model = build(name, updates, args.shape)
    began = time.perf_counter()
    train(model, books[0], args.steps, seed)
    seconds = time.perf_counter() - began
    row: Row = {"loss": loss_on(model, books[1], LENGTH), "longer": loss_on(model, books[1], LONGER * LENGTH)}
    print(f"{name:26} {updates:15} seed {seed}: {row['loss']:.4f}, longer {row['longer']:.4f}", flush=True)
    return row | {"parameters": model.num_parameters(), "seconds": round(seconds, 1)}


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Every model, update rule and seed that is asked for."""
    books = read(args.train or []), read([args.valid])[: args.bytes + 1]
    for seed in args.seeds:
        for name in args.models:
            for updates in args.updates:
                key = {"model": name, "updates": updates, "seed": seed, "steps": args.steps, "length": LENGTH}
                key |= {"batch": BATCH, "rate": RATE, "bytes": args.bytes}
                rows.get(key, lambda n=name, u=updates, s=seed: measure(args, n, u, s, books))


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Two rules, on a few bytes of invented text."""
    args.train, args.valid = [args.folder / "a.txt"], args.folder / "b.txt"
    for path in (*args.train, args.valid):
        path.write_text("the river ran past the mill and on to the sea.\n" * 150, encoding="utf-8")
    args.steps, args.bytes, args.seeds, args.models, args.updates = 2, 2048, [0], ["hope_attention"], ["none", "all"]
    args.shape = {"hidden_size": 32, "num_layers": 1}
    run(args, rows)


def report(rows: Sequence[Row]) -> Report:
    """Mean and range over the seeds."""
    lines = []
    for name in MODELS:
        for updates, (meaning, _) in UPDATES.items():
            own = [r for r in rows if (r["model"], r["updates"]) == (name, updates)]
            if own:
                cells = [_told([r[which] for r in own]) for which in ("loss", "longer")]
                lines.append([f"`{name}`", f"{updates}: {meaning}", *cells])
    head = ["model", "updates", f"windows of {LENGTH}", f"windows of {LONGER * LENGTH}"]
    return Report({"results": table(head, lines) if lines else EMPTY})


def _told(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Books, models, update rules, seeds."""
    parser.add_argument("--train", type=Path, nargs="+", metavar="BOOK", help="books of Project Gutenberg")
    parser.add_argument("--valid", type=Path, help="the book that is judged")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--updates", nargs="*", default=["none", "proximal, gain"], choices=list(UPDATES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--bytes", type=int, default=BYTES, help="that are judged")
    parser.set_defaults(shape=SHAPE)


REPRODUCTION = Reproduction(run, report, quick, arguments)
