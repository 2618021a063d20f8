"""What the commands take that learn from documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RECORDS = "Records"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, hub id or GGUF file.", show_default=False)]
Paths = Annotated[
    list[str],
    typer.Argument(metavar="PATH...", help="Files or directories of text; - is standard input.", show_default=False),
]
Place = Annotated[Path, typer.Option(metavar="PATH", help="The memory: new, or to go on from.", show_default=False)]
KeepTexts = Annotated[
    bool,
    typer.Option(
        "--keep-texts",
        help="Keep the texts beside the memory, for nestling memory forget. A memory that has begun to goes on to.",
        rich_help_panel=RECORDS,
    ),
]
Key = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Encrypt the texts kept with this key (nestling memory key makes one).",
        rich_help_panel=RECORDS,
        show_default=False,
    ),
]
Note = Annotated[str, typer.Option(help="A line to keep with the snapshot.", rich_help_panel=RECORDS)]
