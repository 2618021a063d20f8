"""What the demo found, as tables for the terminal and as the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from torch import Tensor

from nestling.demo.plan import Plan
from nestling.demo.settings import DemoSettings
from nestling.demo.stages import Reading, Recall, Trained
from nestling.evaluation.language import loss_by_position
from nestling.plotting.curves import Series, line_chart
from nestling.plotting.page import Chart, Section, html_page

TITLES = {"hope": "Hope", "transformer": "Transformer++"}
STARTS = {
    "state": "with the state from the file",
    "recent": "having read only the {window} bytes before it",
    "nothing": "without state",
}
LOSS = "loss, nats per byte"


def show_training(trained: dict[str, Trained], settings: DemoSettings, console: Console) -> None:
    """Both validation losses."""
    columns, rows = _training_table(trained, settings)
    _print("Validation loss on held-out text of the corpus, nats per byte (lower is better)", columns, rows, console)


def show_reading(reading: Reading, settings: DemoSettings, console: Console) -> None:
    """Loss against position, state carried and reset."""
    columns, rows = _reading_table(reading, settings)
    _print(f"Reading {reading.document.name}: loss against position, nats per byte", columns, rows, console)


def show_recall(recall: Recall, settings: DemoSettings, console: Console) -> None:
    """Loss on the continuation with and without the state."""
    columns, rows = _recall_table(recall, settings)
    _print(f"The next {settings.continuation:,} bytes, read by process {recall.process}", columns, rows, console)


def write_page(
    settings: DemoSettings, plan: Plan, trained: dict[str, Trained], reading: Reading, recall: Recall, seconds: float
) -> None:
    """Write the report; an earlier one is replaced."""
    sections = [
        _training_section(settings, trained),
        _reading_section(settings, reading),
        _recall_section(settings, recall),
        *(
            Section(
                f"What {TITLES[n]} writes",
                [f"A sample at temperature 0.8 after {plan.tokens:,} bytes."],
                quote=t.result.sample,
            )
            for n, t in trained.items()
        ),
    ]
    lead = (
        f"A Hope language model and a Transformer++ of equal size, each trained on {plan.tokens:,} bytes of Python's "
        "language reference, then reading a text that neither has seen."
    )
    footer = (
        f"Made by python -m nestling.demo in {seconds / 60:.1f} minutes. One seed and small models: this shows how it "
        "works, and compares nothing in general."
    )
    page = html_page("Hope reads and remembers", lead, sections, footer)
    settings.report_file.write_text(page, encoding="utf-8")


def _training_section(settings: DemoSettings, trained: dict[str, Trained]) -> Section:
    columns, rows = _training_table(trained, settings)
    lines = []
    for color, (name, run) in enumerate(trained.items()):
        losses = [r for r in run.metrics if "loss" in r]
        lines.append(Series(TITLES[name], [r["tokens"] for r in losses], [r["loss"] for r in losses], color))
    chart = line_chart(lines, x_label="bytes of training text", y_label=LOSS)
    return Section(
        "Training",
        [
            f"Same text, same order, same optimizer. In training the state is carried from one sequence of "
            f"{settings.sequence_length} bytes to the next: for Hope the fast weights, for the Transformer++ the keys "
            f"and values of the last {settings.sequence_length} bytes."
        ],
        columns,
        rows,
        [Chart(chart, "Training loss of both models against bytes of training text", "Training loss")],
    )


def _reading_section(settings: DemoSettings, reading: Reading) -> Section:
    columns, rows = _reading_table(reading, settings)
    modes = [(n, m) for n in reading.losses for m in ("carried", "reset")]
    lines = [
        _curve(
            f"{TITLES[n]}, state {m}",
            reading.losses[n][m],
            settings.bins,
            0 if n == "transformer" else 1,
            m == "reset",
        )
        for n, m in modes
    ]
    chart = line_chart(lines, x_label="position in the text, bytes", y_label=LOSS)
    return Section(
        "Reading a text it has never seen",
        [
            f"The text is {reading.document.name}. The trained weights stay as they are; what changes while a model "
            f"reads is its state, carried from the first byte on or reset every {settings.sequence_length} bytes.",
            "Not all of the difference is long memory. After a reset a model begins again in the middle of a sentence, "
            "and, trained with its state carried, it has rarely seen a fresh one.",
        ],
        columns,
        rows,
        [Chart(chart, "Loss against position in the unseen text, state carried and reset", "Loss against position")],
    )


def _recall_section(settings: DemoSettings, recall: Recall) -> Section:
    columns, rows = _recall_table(recall, settings)
    lines = [
        _curve(_start_label(name, settings), losses, settings.bins, 1 + i, dashed=name != "state")
        for i, (name, losses) in enumerate(recall.losses.items())
    ]
    chart = line_chart(lines, x_label="position in the continuation, bytes", y_label=LOSS)
    return Section(
        "Remembering in another process",
        [
            f"Hope's state after {recall.position:,} bytes was saved to {settings.state_file.name} "
            f"({recall.bytes / 1024:,.0f} KiB). A new process (id {recall.process}) loaded the model and the state "
            f"and read the next {settings.continuation:,} bytes."
        ],
        columns,
        rows,
        [Chart(chart, "Loss on the continuation with and without the state file", "Loss on the continuation")],
    )


def _training_table(trained: dict[str, Trained], settings: DemoSettings) -> tuple[list[str], list[list[str]]]:
    columns = [
        "model",
        "parameters",
        "bytes trained on",
        "minutes",
        "validation, state carried",
        f"reset every {settings.sequence_length}",
    ]
    rows = [
        [
            TITLES[name],
            f"{run.result.parameters:,}",
            f"{run.result.tokens:,}",
            f"{run.result.seconds / 60:.1f}",
            f"{run.carried.loss:.3f}",
            f"{run.reset.loss:.3f}",
        ]
        for name, run in trained.items()
    ]
    return columns, rows


def _reading_table(reading: Reading, settings: DemoSettings) -> tuple[list[str], list[list[str]]]:
    columns = ["bytes", *(f"{TITLES[n]}, {m}" for n in reading.losses for m in ("carried", "reset"))]
    all_losses = [reading.losses[n][m] for n in reading.losses for m in ("carried", "reset")]
    binned = [loss_by_position(losses, bins=8) for losses in all_losses]
    rows = [
        [f"{bins[0].start:,} to {bins[0].stop:,}", *(f"{b.loss:.3f}" for b in bins)]
        for bins in zip(*binned, strict=True)
    ]
    rows.append(["all", *(f"{float(losses.mean()):.3f}" for losses in all_losses)])
    return columns, rows


def _recall_table(recall: Recall, settings: DemoSettings) -> tuple[list[str], list[list[str]]]:
    window = settings.sequence_length
    columns = [f"Hope reads on ... ({LOSS})", f"first {window} bytes", "all bytes"]
    rows = [
        [_start_label(name, settings), f"{float(losses[:window].mean()):.3f}", f"{float(losses.mean()):.3f}"]
        for name, losses in recall.losses.items()
    ]
    return columns, rows


def _start_label(name: str, settings: DemoSettings) -> str:
    return STARTS[name].format(window=settings.sequence_length)


def _curve(label: str, losses: Tensor, bins: int, color: int, dashed: bool) -> Series:
    found = loss_by_position(losses, bins=bins)
    return Series(label, [(b.start + b.stop) / 2 for b in found], [b.loss for b in found], color, dashed)


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    console.print(f"\n{title}", style="bold", highlight=False)  # a table's own title wraps at the table's width
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
