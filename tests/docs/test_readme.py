"""README.md: short, and its lines work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_WORDS = 700
PROSE = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(path: Path, language: str = "python") -> list[str]:
    """Fenced code of a page, without what has a title (a file to be written)."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_readme_is_short() -> None:
    """What has more to say goes to docs/."""
    words = len((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert words <= MOST_WORDS, f"README.md has {words} words"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_lines_work(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would paste them, one block after the other."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(ROOT / page):
        exec(compile(block, page, "exec"), names)
    if page == "README.md":
        assert len(blocks(ROOT / page)) == 1 and len(blocks(ROOT / page)[0].splitlines()) <= 12


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_of_the_pages_is_python(path: Path) -> None:
    """Every block of Python compiles."""
    for block in blocks(path):
        compile(block, str(path), "exec")


@pytest.mark.parametrize("path", [p for p in PROSE if p.name != "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_lines_of_prose_are_short(path: Path) -> None:
    """At most 160 characters, rows of tables apart: a long line hides what changed in it."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 160 or line.startswith("|"), f"{path.name}:{number} has {len(line)} characters"
