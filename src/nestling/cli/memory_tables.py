"""What the `nestling memory` commands check and print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from nestling.cli.console import cell, quiet_libraries, say
from nestling.cli.loading import document_tokens, load_causal_lm
from nestling.continual.learn_documents import frozen_loss
from nestling.continual.learner.options import settings_from
from nestling.continual.store.adapters import about
from nestling.continual.store.memory import Memory
from nestling.continual.store.memory_file import DTYPES, is_memory_file
from nestling.continual.store.merge import Comparison, Shares
from nestling.continual.store.records import DocumentRecord
from nestling.continual.store.snapshots import INDEX, Index
from nestling.continual.store.summary import summarize
from nestling.errors import UserError
from nestling.printing import short
from nestling.tasks.text import read_documents

ROWS = 20  # documents and snapshots shown
CONTEXT = 512  # for a memory that does not say with how much it was learned, as in `frozen_loss`


def description(memory: Memory, index: Index | None) -> dict[str, Any]:
    """What `show --json` prints."""
    summary = summarize(memory)
    documents = [asdict(d) | {"loss": d.loss if math.isfinite(d.loss) else None} for d in memory.documents]
    return {
        "fingerprint": memory.fingerprint,
        "tokens": memory.tokens,
        "levels": [asdict(level) for level in summary.levels],
        "layers": {str(layer): norm for layer, norm in summary.layers.items()},
        "adapters": [
            {"passages": len(each.scope.passages), "words": len(each.scope.surprise)} for each in memory.adapters
        ],
        "difference_bytes": summary.difference_bytes,
        "learner_bytes": summary.learner_bytes,
        "documents": documents,
        "head": None if index is None else index.head,
        "snapshots": [] if index is None else [asdict(s) for s in index.snapshots],
    }


def print_memory(console: Console, path: Path, memory: Memory, index: Index | None) -> None:
    """Print what `show` shows."""
    summary = summarize(memory)
    say(console, f"{path}: {memory.tokens:,} tokens, base model {short(memory.fingerprint)}")
    console.print(f"differences {summary.difference_bytes:,} bytes, for learning on {summary.learner_bytes:,} bytes")
    if memory.adapters:
        say(console, f"speaks from where a text names {about([each.scope for each in memory.adapters])}")
    table = _table("level", "period", "tensors", "changed", "norm")
    for level in summary.levels:
        period = "" if level.period is None else f"{level.period:,}"
        table.add_row(cell(level.level), period, str(level.parameters), str(level.changed), f"{level.norm:.4g}")
    console.print(table)
    table = _table("layer", "norm")
    for layer, norm in summary.layers.items():
        table.add_row("none" if layer < 0 else str(layer), f"{norm:.4g}")
    console.print(table)
    print_documents(console, memory.documents)
    if index is not None:
        table = _table("snapshot", "from", "time", "tokens", "bytes", "note", title=_rest("snapshots", index.snapshots))
        for s in index.snapshots[-ROWS:]:
            number = f"{s.number} (head)" if s.number == index.head else str(s.number)
            parent = "" if s.parent is None else str(s.parent)
            table.add_row(number, parent, _minute(s.time), f"{s.tokens:,}", f"{s.bytes:,}", cell(s.note))
        console.print(table)


def print_documents(console: Console, documents: Sequence[DocumentRecord]) -> None:
    """The last documents with their losses."""
    table = _table("document", "tokens", "loss", "read", "begun", title=_rest("documents", documents))
    for d in documents[-ROWS:]:
        loss = f"{d.loss:.4f}" if math.isfinite(d.loss) else ""
        whole = "to the end" if d.finished else "in part"
        table.add_row(cell(d.name or "(tokens)"), f"{d.tokens:,}", loss, whole, _minute(d.started))
    console.print(table)


def print_comparison(console: Console, a: Path, b: Path, comparison: Comparison) -> None:
    """Print what `diff` shows."""
    table = _table("level", "norm of A", "norm of B", "cosine")
    for level in comparison.levels:
        cosine = "" if math.isnan(level.cosine) else f"{level.cosine:.4f}"
        table.add_row(cell(level.level), f"{level.norms[0]:.4g}", f"{level.norms[1]:.4g}", cosine)
    console.print(table)
    for name, path, documents in (("A", a, comparison.only_a), ("B", b, comparison.only_b)):
        say(console, f"read by {name} ({path}) alone: {len(documents)}")
        if documents:
            print_documents(console, documents)


@dataclass(frozen=True)
class Measured:
    """What losses are measured with.

    Attributes:
        model: the base model.
        texts: tokens by name.
        context: that they are read with.
    """

    model: PreTrainedModel
    texts: dict[str, Tensor]
    context: int

    def losses(self, memories: Mapping[str, Memory | None]) -> dict[str, list[float]]:
        """Mean loss in nats of each text with each memory.

        Raises:
            MemoryUseError: a memory of another model.
        """
        found = {}
        for name, memory in memories.items():
            with nullcontext() if memory is None else memory.applied(self.model):
                found[name] = [frozen_loss(self.model, ids, self.context) for ids in self.texts.values()]
        return found


def load_measured(source: str, paths: Sequence[str], measure: int, memory: Memory) -> Measured:
    """A model, and the first `measure` tokens of each text, to be read as the learner of `memory` reads.

    Raises:
        UserError: a model or text that cannot be loaded.
    """
    documents = [document for path in paths for document in read_documents(path)]
    quiet_libraries()
    model, tokenizer = load_causal_lm(source)
    texts = {d.name: document_tokens(source, model, tokenizer, d.text)[:measure] for d in documents}
    made = memory.settings.get("learner")
    return Measured(model, texts, CONTEXT if made is None else settings_from(made).context)


def print_losses(console: Console, measured: Measured, losses: Mapping[str, Sequence[float]]) -> None:
    """A row for every text, a column for every memory."""
    table = _table("text", "tokens", *losses, title="loss in nats")
    for place, (text, ids) in enumerate(measured.texts.items()):
        table.add_row(cell(text), f"{len(ids):,}", *(f"{column[place]:.4f}" for column in losses.values()))
    console.print(table)


def parse_weights(weight: str | None, levels: Sequence[str]) -> tuple[Shares | None, dict[str, Shares]]:
    """`"0.7,0.3"`, and `["fast=1,0"]` by level.

    Raises:
        UserError: not of that form.
    """
    found: dict[str, Shares] = {}
    for entry in levels:
        name, equals, pair = entry.rpartition("=")
        if not equals or not name or name in found:
            raise UserError(f"--level {entry}: write NAME=A,B, each level once, as in --level fast=0.7,0.3")
        found[name] = _pair("--level", entry, pair)
    return None if weight is None else _pair("--weight", weight, weight), found


def check_new(out: Path) -> None:
    """Raises UserError where something is in the way of a new memory."""
    if out.exists():
        raise UserError(f"there is already something at {out}; give a new path")


def check_measuring(model: str | None, texts: Sequence[str] | None) -> None:
    """Raises UserError for a model without texts, or texts without a model."""
    if (model is None) != (not texts):
        raise UserError("--model and --text go together: a loss needs both")


def check_export(path: Path, out: Path, dtype: str, overwrite: bool) -> None:
    """Raises UserError for a place or dtype that cannot be, before any work is done. Only memories are replaced."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose one of: {', '.join(DTYPES)}")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out} cannot be a file; give a file name in a directory that exists")
    if (out.parent / INDEX).exists():
        raise UserError(f"{out} is among the snapshots of {out.parent}; give a place outside")
    if out.exists() and not is_memory_file(out):
        raise UserError(f"{out} exists and is no memory; give a new path")
    if out.exists() and not overwrite:
        raise UserError(f"there is already a memory at {out}; give a new path, or replace it with --overwrite")


def _pair(option: str, entry: str, pair: str) -> Shares:
    try:
        a, b = (float(part) for part in pair.split(","))
    except ValueError as error:
        raise UserError(f"{option} {entry}: write two numbers, as in 0.5,0.5") from error
    return a, b


def _table(*headings: str, title: str | None = None) -> Table:
    table = Table(title=title)
    for place, heading in enumerate(headings):
        text = not place or heading in ("time", "note", "read", "begun")
        table.add_column(heading, justify="left" if text else "right", overflow="fold")
    return table


def _minute(time: str) -> str:
    """ISO 8601 to the minute, in UTC."""
    return cell(time[:16].replace("T", " "))


def _rest(what: str, rows: Sequence[Any]) -> str:
    return f"{what}, the last {ROWS} of {len(rows):,}" if len(rows) > ROWS else what
