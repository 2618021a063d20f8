"""Optimizers on a small ViT and on small language models, each tuned (NL Figure 11, at small scale).

A vision transformer of 0.2M parameters on 8,000 images of MNIST (the 10,000 of its test set, split anew), six epochs of
batches of 128, 10% warm-up, cosine to a tenth, weight decay 0.05; and language models, see language.py. The learning
rates of a grid, extended by factors of two until the best is not at its edge, run with seed 0; the rate with the lowest
validation loss runs with two more seeds, and the test images are judged by those three. `--quick` trains each optimizer
for some steps on scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from nestling.optim import build
from nestling.plotting.curves import Series, line_chart
from reproductions.figure11 import language
from reproductions.figure11.tune import SEEDS, chosen, grid_table, grids, tune
from reproductions.figure11.vit import Set, VisionTransformer, digits, mnist
from reproductions.harness.command import Reproduction
from reproductions.harness.report import EMPTY, Report, table
from reproductions.harness.rows import Row, Rows
from reproductions.harness.schedule import warm_cosine

PARTS = ("vit", "language")
STARTS = {"adamw": 1e-3, "muon": 2e-3, "m3": 2e-3, "delta_momentum": 0.1}
BATCH, EPOCHS, WEIGHT_DECAY = 128, 6, 0.05


def evaluate(model: VisionTransformer, data: Set) -> tuple[float, float]:
    """Mean cross entropy in nats, and accuracy."""
    with torch.no_grad():
        logits = torch.cat([model(part) for part in data[0].split(500)])
    return float(F.cross_entropy(logits, data[1])), float((logits.argmax(-1) == data[1]).float().mean())


def train(name: str, rate: float, seed: int, sets: tuple[Set, Set, Set], patch: int, steps: int) -> Row:
    """One training: losses at its end and on the way."""
    torch.manual_seed(seed)
    (images, labels), valid, test = sets
    model = VisionTransformer(images.shape[-1], patch)
    optimizer = build(name, model, lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = warm_cosine(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    start, losses, order = time.perf_counter(), [], torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(images), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        if not torch.isfinite(loss):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    row: Row = {"steps": len(losses), "diverged": len(losses) < steps}
    for part, data in (("train", (images, labels)), ("validation", valid), ("test", test)):
        row[part], row[f"{part}_accuracy"] = evaluate(model, data)
    row["losses"] = [statistics.mean(losses[i : i + 10]) for i in range(0, len(losses), 10)]
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def run(args: argparse.Namespace, rows: Rows) -> None:
    """Grids and seeds of both parts."""
    if "vit" in args.parts:
        if args.mnist is None:
            raise SystemExit("--mnist DIR is needed for the part vit (or --parts language, or --quick)")
        sets = mnist(args.mnist)
        steps = EPOCHS * (len(sets[0][0]) // BATCH)
        starts = {name: STARTS[name] for name in args.optimizers}
        tune(rows, lambda name, rate, seed: train(name, rate, seed, sets, 7, steps), starts, args.seeds)
    if "language" in args.parts:
        starts = {f"{preset} {n}": language.STARTS[n] for preset in language.PRESETS for n in args.optimizers}
        tune(rows, lambda name, rate, seed: language.run(name, rate, seed, args.tokens), starts, args.seeds)


def quick(args: argparse.Namespace, rows: Rows) -> None:
    """Every optimizer for eight steps on digits."""
    for name, rate in STARTS.items():
        key = {"optimizer": name, "rate": rate, "seed": 0}
        rows.get(key, lambda n=name, r=rate: train(n, r, 0, digits(), 2, 8))


def report(rows: Sequence[Row]) -> Report:
    """Both tables, both grids, and the training losses of the ViT."""
    names = [f"{preset} {name}" for preset in language.PRESETS for name in STARTS]
    best, spoken = chosen(rows, list(STARTS)), chosen(rows, names)
    tables, pictures = [], {}
    if best:
        head = ["optimizer", "lr", "train loss", "test loss (seeds)", "test accuracy", "seconds a run"]
        tables.append(table(head, [_line(name, own) for name, own in best.items()]))
        tables.append("![training losses of the ViT](losses.svg)")
        pictures["losses.svg"] = lambda: _picture(best)
    if spoken:
        tables.append(language.table_of(spoken))
    tried = grids(rows, [*STARTS, *names])
    parts = {"results": "\n\n".join(tables) or EMPTY, "grids": grid_table(tried) if tried else EMPTY}
    return Report(parts, pictures)


def _line(name: str, rows: Sequence[Row]) -> list[str]:
    training, test, right, seconds = ([r[k] for r in rows] for k in ("train", "test", "test_accuracy", "seconds"))
    told = f"{statistics.mean(test):.4f} ({', '.join(f'{v:.4f}' for v in test)})"
    cells = [f"{rows[0]['rate']:.3g}", f"{statistics.mean(training):.4f}", told]
    return [f"`{name}`", *cells, f"{statistics.mean(right):.2%}", f"{statistics.median(seconds):.0f}"]


def _picture(best: dict[str, list[Row]]) -> str:
    """Training losses, mean of the seeds, the highest at the end first in the legend."""
    lines = []
    for color, (name, rows) in enumerate(best.items()):
        mean = [statistics.mean(values) for values in zip(*(r["losses"] for r in rows), strict=True)]
        lines.append(Series(name, [10 * (j + 1) for j in range(len(mean))], mean, color))
    lines.sort(key=lambda line: -line.y[-1])
    return line_chart(lines, x_label="step (mean of the seeds)", y_label="training loss, nats")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Parts, data, optimizers."""
    parser.add_argument("--mnist", type=Path, help="folder of MNIST's t10k files")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--optimizers", nargs="*", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--tokens", type=int, default=100_000, help="of a language model's training")


REPRODUCTION = Reproduction(run, report, quick, arguments)
