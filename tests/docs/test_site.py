"""The documentation site: what is on it, and that a built one needs no other host."""

from __future__ import annotations

import re
from pathlib import Path

import api_pages
import check_site
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_module_has_its_place_in_the_reference() -> None:
    """Every module of the package is on exactly one page, private ones and the programs' starts apart."""
    shown = [m for page in api_pages.pages(ROOT) for m in re.findall(r"^::: (\S+)$", api_pages.page(ROOT, page), re.M)]
    wanted = []
    for path in (ROOT / "src" / "nestling").rglob("*.py"):
        if not path.stem.startswith("_"):
            wanted.append(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
    assert sorted(shown) == sorted(wanted)


def test_every_package_can_be_collected() -> None:
    """A folder of modules is a package with an `__init__.py`: the reference reads the source through it."""
    folders = {path.parent for path in (ROOT / "src" / "nestling").rglob("*.py")}
    assert not [f.name for f in folders if not (f / "__init__.py").exists()]


def test_every_page_is_in_the_navigation() -> None:
    """Pages of docs/ are listed in mkdocs.yml; hooks add the API, the results and the reproductions."""
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert pages - listed - {"api/index.md", "results.md"} == set()
    assert listed - pages == {"contributing.md", "changelog.md", "native.md"}


@pytest.mark.parametrize(
    "element",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<img src="http://example.org/a.png">',
        '<p style="background: url(https://example.org/a.png)">x</p>',
        "<style>@import 'https://fonts.example/css';</style>",
    ],
)
def test_what_another_host_serves_is_found(tmp_path: Path, element: str) -> None:
    """Scripts, styles, fonts and pictures, wherever they are named."""
    (tmp_path / "index.html").write_text(f"<html><body>{element}</body></html>")
    assert check_site.loads_elsewhere(tmp_path)


def test_links_for_readers_are_fine(tmp_path: Path) -> None:
    """A reader may follow a link to another host; nothing of it is loaded before."""
    (tmp_path / "index.html").write_text(
        '<link rel="canonical" href="https://example.org"><a href="https://arxiv.org">paper</a><img src="a.svg">'
    )
    (tmp_path / "a.css").write_text("a { background: url(b.png) } /* see https://example.org */")
    assert not check_site.loads_elsewhere(tmp_path)
