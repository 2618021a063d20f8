"""What rows say, as Markdown between markers and as pictures."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reproductions.harness.rows import NAME, Row

TEXTS = ("RESULTS.md", "notes.md")
"""Of a reproduction; whatever of a report they have markers for is written into them."""
PROVENANCE = "provenance"
EMPTY = "Nothing finished yet."
COMMANDS = 2
"""Are told in the provenance at most."""


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        parts: Markdown by the name of its markers; `results` is the table of RESULTS.md with its picture.
        pictures: what draws them as SVG, by file name.
    """

    parts: dict[str, str]
    pictures: dict[str, Callable[[], str]] = field(default_factory=dict)


def write(folder: Path, report: Report, rows: Sequence[Row]) -> list[Path]:
    """The pictures, and the parts into the texts of the folder, or into report.md where there are none.

    Returns:
        what was written.
    """
    parts = report.parts | {PROVENANCE: provenance(rows)}
    written = []
    for name, draw in report.pictures.items():
        (folder / name).write_text(draw(), encoding="utf-8")
        written.append(folder / name)
    texts = [folder / name for name in TEXTS if (folder / name).exists()]
    for path in texts:
        path.write_text(filled(path.read_text(encoding="utf-8"), parts), encoding="utf-8")
    if not texts:
        path = folder / "report.md"
        path.write_text("\n\n".join(part.strip() for part in parts.values()) + "\n", encoding="utf-8")
        texts = [path]
    return written + texts


def filled(text: str, parts: dict[str, str]) -> str:
    """A text with the parts between its markers, `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        ValueError: a marker that is not closed, or one without a part.
    """
    names = re.findall(r"<!-- begin ([\w-]+) -->", text)
    for name in names:
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the markers {begin} and {end} are not there once each; put both around the part")
        if name not in parts:
            raise ValueError(f"nothing is generated for {begin}; there are {', '.join(parts)}")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{parts[name].strip()}\n\n{end}{rest.split(end)[1]}"
    return text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def provenance(rows: Sequence[Row]) -> str:
    """What made the rows: how many of which commit and machine, their seeds, and the commonest commands."""
    if not rows:
        return EMPTY
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((_commit(row), _machine(row)), []).append(row)
    lines = []
    for (commit, machine), own in sorted(groups.items(), key=lambda group: -len(group[1])):
        seeds = sorted({row["seed"] for row in own if row.get("seed") is not None})
        shown = f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""
        lines.append(f"- {len(own)} row{'s' * (len(own) > 1)}{shown}: {commit}; {machine}")
    text = f"{len(rows)} row{'s' * (len(rows) > 1)} in [{NAME}]({NAME}):\n\n" + "\n".join(lines)
    commands = Counter(row["made"]["command"] for row in rows if row.get("made", {}).get("command"))
    if commands:
        told = "\n".join(_wrapped(command) for command, _ in commands.most_common(COMMANDS))
        text += f"\n\nMade by\n\n{told}"
    if len(commands) > COMMANDS:
        text += f"\n\nand {len(commands) - COMMANDS} more commands; each row has its own under `made`."
    return text


def _commit(row: Row) -> str:
    commit = row.get("made", {}).get("commit")
    return f"commit `{commit}`" if commit else "commit not recorded"


def _machine(row: Row) -> str:
    made = row.get("made", {})
    machine = [str(row.get("hardware") or made.get("machine", "machine not recorded"))]
    if "threads" in made:
        machine.append(f"{made['threads']} thread" + "s" * (made["threads"] != 1))
    if "torch" in made:
        machine.append(f"torch {str(made['torch']).split('+')[0]}")
    return ", ".join(machine)


def _wrapped(command: str) -> str:
    """As an indented block, on lines of a screen's width."""
    lines = textwrap.wrap(command, 108, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"    {'    ' * (i > 0)}{line}" + " \\" * (i < len(lines) - 1) for i, line in enumerate(lines))
