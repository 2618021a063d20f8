"""Pages of the API reference: one for every folder of the package, with all its public modules."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = "src/nestling"


def pages(root: Path) -> dict[str, str]:
    """Page of the site to the name of the package that it shows, in alphabetical order."""
    folders = {path.parent for path in (root / PACKAGE).rglob("*.py") if public(path)}
    names = sorted(".".join(folder.relative_to(root / "src").parts) for folder in folders)
    return {f"api/{name}.md": name for name in names}


def page(root: Path, path: str) -> str:
    """The page's Markdown: the package's own words, then each module. In a search the guides come first."""
    name = path.removeprefix("api/").removesuffix(".md")
    folder = root / "src" / name.replace(".", "/")
    init = folder / "__init__.py"
    words = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) if init.exists() else None
    lines = ["---", "search:", "  boost: 0.3", "---", "", f"# {name} {{#{name}}}", "", words or "", ""]
    for file in sorted(folder.glob("*.py")):
        if public(file) and file.name != "__init__.py":
            lines += [f"::: {name}.{file.stem}", ""]
    return "\n".join(lines) + "\n"


def public(path: Path) -> bool:
    """Whether a module is shown: not a private one, and not what only starts a program."""
    return not path.stem.startswith("_") or (path.name == "__init__.py" and path.read_text().strip() != "")
