"""Names of functions in docs/paper_map.md: where they are, and links to them."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

SPAN = re.compile(r"`([^`]+)`")
FILE = re.compile(r"^\w[\w/]*(?:\.(?:py|cpp|h)|/)$")
NAME = re.compile(r"^[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?$")
FOLDERS = ("src/nestling", "")


@dataclass(frozen=True)
class Reference:
    """A code span that names a file of the repository, and perhaps something that the file defines."""

    span: str
    file: str
    name: str | None


def references(text: str) -> list[Reference]:
    """Those of a line or a cell. `file.py: name` names both; a plain `name` after it is in the same file."""
    found: list[Reference] = []
    for match in SPAN.finditer(text):
        span = match.group(1)
        file, _, name = span.partition(": ")
        if FILE.match(file):
            found.append(Reference(span, file, name or None))
        elif NAME.match(span) and found and found[-1].name:
            found.append(Reference(span, found[-1].file, span))
    return found


def locate(file: str, root: Path) -> Path | None:
    """The file or folder, given from src/nestling or from the root."""
    return next((root / folder / file for folder in FOLDERS if (root / folder / file).exists()), None)


def defines(path: Path, name: str) -> bool:
    """Whether a Python file defines `name`, or the method of a class as `Class.method` or `method`."""
    return name in _names(path) or any(known.endswith(f".{name}") for known in _names(path))


def link(markdown: str, root: Path) -> str:
    """Make the first column of functions links to the API reference, where the name is public there."""
    lines = []
    for line in markdown.splitlines():
        for reference in references(line) if line.startswith("|") else []:
            target = _target(reference, root)
            if target:
                line = line.replace(f"`{reference.span}`", f"[`{reference.span}`][{target}]", 1)
        lines.append(line)
    return "\n".join(lines) + "\n"


def _target(reference: Reference, root: Path) -> str | None:
    """The nearest thing of the API reference: the name, its class, or its module."""
    path = locate(reference.file, root)
    if path is None or path.suffix != ".py" or "src" not in path.relative_to(root).parts:
        return None
    module = ".".join(path.relative_to(root / "src").with_suffix("").parts).removesuffix(".__init__")
    names = _names(path)
    name = reference.name or ""
    full = next((n for n in names if n == name or n.endswith(f".{name}")), "") if name else ""
    shown = [part for part in full.split(".") if part]
    while shown and any(part.startswith("_") for part in shown):
        shown.pop()
    return ".".join([module, *shown])


def _names(path: Path) -> list[str]:
    if path.suffix != ".py":
        return re.findall(r"\b([A-Za-z_]\w*)\s*\(", path.read_text(encoding="utf-8"))
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        if isinstance(node, ast.ClassDef):
            names += [f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)]
        if isinstance(node, ast.Assign):
            names += [t.id for t in node.targets if isinstance(t, ast.Name)]
    return names
