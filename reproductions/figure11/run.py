"""A small ViT under AdamW, Muon, M3 and delta momentum (NL Figure 11, at small scale), each tuned.

    python -m reproductions figure11 --mnist DIR [--quick]

A vision transformer of 0.2M parameters on 8,000 images of MNIST (the 10,000 of its test set, split anew), six epochs of
batches of 128, 10% warm-up, cosine to a tenth, weight decay 0.05. The learning rates of a grid, extended by factors of
two until the best is not at its edge, run with seed 0; the rate with the lowest validation loss runs with two more
seeds, and the test images are judged by those three. Finished runs are kept in results.jsonl beside this file, so the
command may be interrupted and repeated; table.md and losses.svg come at the end. `--quick` trains each optimizer for
some steps on scikit-learn's digits and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from nestling.optim import build
from nestling.plotting.curves import Series, line_chart
from reproductions.figure11.tune import Row, Runs, grid_table
from reproductions.figure11.vit import Set, VisionTransformer, digits, mnist

HERE = Path(__file__).parent
RUNS = HERE / "results.jsonl"
STARTS = {"adamw": 1e-3, "muon": 2e-3, "m3": 2e-3, "delta_momentum": 0.1}
BATCH, EPOCHS, WEIGHT_DECAY, WARMUP = 128, 6, 0.05, 0.1


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
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        steps,
        pct_start=WARMUP,
        div_factor=25,
        final_div_factor=0.4,
        cycle_momentum=False,
    )
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


def table(grids: dict[str, list[Row]], best: dict[str, list[Row]]) -> str:
    """Markdown: the best rate with all seeds, then the grid."""
    lines = [
        "| optimizer | lr | train loss | test loss (seeds) | test accuracy | seconds a run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in best.items():
        train, test, right, seconds = ([r[k] for r in rows] for k in ("train", "test", "test_accuracy", "seconds"))
        lines.append(
            f"| `{name}` | {rows[0]['rate']:.3g} | {statistics.mean(train):.4f} | {statistics.mean(test):.4f} "
            f"({', '.join(f'{v:.4f}' for v in test)}) | {statistics.mean(right):.2%} | "
            f"{statistics.median(seconds):.0f} |"
        )
    return "\n".join([*lines, "", *grid_table(grids)]) + "\n"


def main() -> None:
    """Grid, seeds, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="folder of MNIST's t10k files")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        for name, rate in STARTS.items():
            row = train(name, rate, 0, digits(), 2, 20)
            print(f"{name}: training loss {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}")
        return
    if args.mnist is None:
        parser.error("--mnist DIR is needed (or --quick)")
    sets = mnist(args.mnist)
    steps = EPOCHS * (len(sets[0][0]) // BATCH)
    runs = Runs(RUNS, lambda name, rate, seed: train(name, rate, seed, sets, 7, steps))
    grids = {name: runs.tune(name, start) for name, start in STARTS.items()}
    best = {name: runs.seeds(grid) for name, grid in grids.items()}
    (HERE / "table.md").write_text(table(grids, best))
    lines = []
    for i, (name, rows) in enumerate(best.items()):
        mean = [statistics.mean(values) for values in zip(*(r["losses"] for r in rows), strict=True)]
        lines.append(Series(name, [10 * (j + 1) for j in range(len(mean))], mean, i))
    (HERE / "losses.svg").write_text(
        line_chart(lines, x_label="step (mean of the seeds)", y_label="training loss, nats")
    )
    print(table(grids, best))


if __name__ == "__main__":
    main()
