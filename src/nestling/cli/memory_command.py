"""`nestling memory`: show, diff, fork, merge, rollback, forget, key, prune, export."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nestling.printing import short

memory = typer.Typer(
    help="Look after what models learned: PATH is a directory of snapshots; where a memory is only read, an exported "
    "file will do.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[Path, typer.Argument(metavar="PATH", help="A memory.", show_default=False)]
Model = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The base model, to measure losses with.", show_default=False)
]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="FILE", help="Text to measure on; may be given again.", show_default=False),
]
Measured = Annotated[int, typer.Option(min=2, metavar="N", help="Measure on the first N tokens of each text.")]


@memory.command()
def show(path: Source, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show levels, documents, size, how far each level and layer has moved, and the snapshots."""
    from nestling.cli.console import stdout_console
    from nestling.cli.memory_tables import description, print_memory
    from nestling.continual.store.store import MemoryStore, load_memory

    if path.is_dir():
        store = MemoryStore(path)
        snapshot, found = store.read()
        index = store.index().headed_by(snapshot)
    else:
        found, index = load_memory(path), None
    if as_json:
        print(json.dumps(description(found, index)))
    else:
        print_memory(stdout_console(), path, found, index)


@memory.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A memory.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another of the same model.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare two memories: how far each level has moved, how alike the directions are, which documents differ."""
    from nestling.cli.console import stdout_console
    from nestling.cli.memory_tables import print_comparison
    from nestling.continual.store.merge import compare
    from nestling.continual.store.store import load_memory

    comparison = compare(load_memory(a), load_memory(b))
    if as_json:
        print(json.dumps(_finite(asdict(comparison))))
    else:
        print_comparison(stdout_console(), a, b, comparison)


@memory.command()
def fork(
    path: Source,
    target: Annotated[Path, typer.Argument(metavar="NEW", help="The new memory; must not exist.", show_default=False)],
    at: Annotated[int | None, typer.Option(min=1, metavar="N", help="Fork snapshot N. Default: the head.")] = None,
) -> None:
    """Begin a new memory with what another holds; both then go on apart."""
    from nestling.cli.console import say, stdout_console
    from nestling.continual.store import store

    head = store.fork(path, target, at).head()
    say(stdout_console(), f"{target}: {short(head.note)} ({head.tokens:,} tokens, {head.bytes:,} bytes)")


@memory.command()
def merge(
    a: Annotated[Path, typer.Argument(metavar="A", help="A memory.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another of the same model.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new memory; must not exist.", show_default=False)],
    weight: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Weights of the two differences. Default: 0.5,0.5, and 1,1 for memories that were studied.",
            show_default=False,
        ),
    ] = None,
    level: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=A,B", help="Other weights for a level; may be given again.", show_default=False),
    ] = None,
    model: Model = None,
    text: Texts = None,
    measure: Measured = 4096,
) -> None:
    """Make one memory of two that were learned apart: the weighted sum of their differences to the base model.

    With --model and --text the losses of the base, A, B and the merge are shown. Forks of one memory are best merged
    with weights that sum to 1; 1,1 adds up what was learned of different things. Memories that were studied stay apart
    in it: each speaks where a text names what it was taught.
    """
    from nestling.cli import memory_tables
    from nestling.cli.console import say, stdout_console
    from nestling.continual.store.merge import merge as merge_memories
    from nestling.continual.store.store import MemoryStore, load_memory

    memory_tables.check_new(out)
    memory_tables.check_measuring(model, text)
    weights, by_level = memory_tables.parse_weights(weight, level or [])
    one, two = load_memory(a), load_memory(b)
    merged = merge_memories(one, two, weights, by_level)
    console = stdout_console()
    if model is not None:
        measured = memory_tables.load_measured(model, text or [], measure, one)
        losses = measured.losses({"base": None, "A": one, "B": two, "merged": merged})
        memory_tables.print_losses(console, measured, losses)
    given = ", ".join([*([] if weight is None else [weight]), *(level or [])])
    head = MemoryStore(out).save(merged, f"merge of {a} and {b}" + (f", weights {given}" if given else ""))
    say(console, f"{out}: {short(head.note)} ({head.bytes:,} bytes)")


@memory.command()
def rollback(
    path: Source,
    to: Annotated[int | None, typer.Option(min=1, metavar="N", help="Snapshot. Default: the one before.")] = None,
) -> None:
    """Go back to an earlier snapshot, or forward again. Nothing is deleted."""
    from nestling.cli.console import say, stdout_console
    from nestling.continual.store.store import MemoryStore

    head = MemoryStore(path).rollback(to)
    say(stdout_console(), f"{path}: now at snapshot {head.number}, {head.time}: {short(head.note)}")


@memory.command()
def forget(
    path: Source,
    documents: Annotated[
        list[str],
        typer.Argument(
            metavar="DOCUMENT...", help="Name, file name, or the first digits of the digest.", show_default=False
        ),
    ],
    model: Annotated[str, typer.Option(metavar="MODEL", help="The base model.", show_default=False)],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text of a document that came later, where the memory keeps none; may be given again.",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of texts kept encrypted.", show_default=False)
    ] = None,
    measure: Annotated[
        int, typer.Option(min=0, metavar="N", help="Measure the loss of what is forgotten on its first N tokens.")
    ] = 4096,
) -> None:
    """Forget documents for good: the memory becomes, bit for bit, the one that never read them.

    It goes back to the last snapshot before them and reads again what came after, which needs those texts: kept beside
    the memory (nestling learn --keep-texts) or given with --text. Snapshots that have read them are deleted, and so are
    their texts. Exported files, forks and merges keep what they have.
    """
    from nestling.cli.forgetting import run

    run(path, documents, model, text or [], key, measure)


@memory.command()
def key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new file; must not exist.", show_default=False)],
) -> None:
    """Make a key that texts are kept encrypted with. Whoever loses it loses the texts, and nothing else."""
    from nestling.cli.console import say, stdout_console
    from nestling.continual.store.texts import make_key

    make_key(file)
    say(stdout_console(), f"{file}: a new key; keep it apart from the memory")


@memory.command()
def prune(
    path: Source, keep: Annotated[int, typer.Option(min=1, metavar="N", help="Snapshots to keep.", show_default=False)]
) -> None:
    """Delete all snapshots but the head and the N - 1 before it, for good."""
    from nestling.cli.console import say, stdout_console
    from nestling.continual.store.store import MemoryStore

    gone = MemoryStore(path).prune(keep)
    numbers = ", ".join(str(s.number) for s in gone) or "none"
    say(stdout_console(), f"{path}: deleted snapshots {numbers} ({sum(s.bytes for s in gone):,} bytes)")


@memory.command()
def export(
    path: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; .safetensors.", show_default=False)],
    rank: Annotated[
        int | None, typer.Option(min=1, metavar="R", help="Limit every matrix to this rank.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    model: Model = None,
    text: Texts = None,
    measure: Measured = 4096,
    at: Annotated[int | None, typer.Option(min=1, metavar="N", help="Export snapshot N. Default: the head.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the memory in OUT.")] = False,
) -> None:
    """Write one file to use or to share: the differences without what only learning needs.

    With --rank it states the share of the difference's energy (squared norm) that was kept, and with --model and --text
    what that costs in loss.
    """
    from nestling.cli import memory_tables
    from nestling.cli.console import say, stdout_console
    from nestling.continual.store.low_rank import for_use, limit_rank
    from nestling.continual.store.memory import Memory
    from nestling.continual.store.store import load_memory

    memory_tables.check_export(path, out, dtype, overwrite)
    memory_tables.check_measuring(model, text)
    found = load_memory(path, at)
    # A model or text that is refused must be so before anything is written.
    measured = None if model is None else memory_tables.load_measured(model, text or [], measure, found)
    losses = {} if measured is None else measured.losses({"base": None, "memory": found})
    small = for_use(found)
    console = stdout_console()
    if rank is not None:
        limited = limit_rank(found, rank)
        small = limited.memory
        console.print(f"rank {rank} keeps {limited.energy:.2%} of the difference's energy")
    size = small.save(out, dtype)
    say(console, f"{out}: {size:,} bytes, {dtype}")
    if measured is not None:
        losses |= measured.losses({"exported": Memory.load(out)})
        memory_tables.print_losses(console, measured, losses)


def _finite(value: object) -> object:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value
