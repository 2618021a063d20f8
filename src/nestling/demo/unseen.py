"""A long English text that neither model has seen, found in what is installed already."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

from nestling.tasks.text import Document

ENOUGH = 36_000  # characters: what the demo reads, with some to spare


def unseen_text() -> Document:
    """The licenses that NumPy bundles (legal English, with the GNU GPL), or else the docstrings of `_pydecimal`.

    NumPy's wheels bundle compiled libraries with their licenses; a NumPy built from source may not. The training
    corpus, Python's language reference, quotes neither.
    """
    licenses = "\n\n".join(_licenses("numpy"))
    if len(licenses) >= ENOUGH:
        return Document("the license file of NumPy (with the GNU General Public License)", licenses)
    return Document("the docstrings of Python's decimal module", _docstrings("_pydecimal"))


def _licenses(distribution: str) -> list[str]:
    files = importlib.metadata.files(distribution) or []
    found = sorted((f for f in files if f.name.startswith("LICENSE") and ".dist-info" in str(f)), key=str)
    return [text for f in found if (text := Path(str(f.locate())).read_text(encoding="utf-8", errors="replace"))]


def _docstrings(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None  # a module of the standard library, written in Python
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    return "\n\n".join(text for n in ast.walk(tree) if isinstance(n, kinds) and (text := ast.get_docstring(n)))
