"""Hooks of MkDocs: pages from outside docs/, links that work on the site and in the repository alike, and equations.

Files of the repository keep their relative links, so that they can be read where they lie. `place` says where a file of
the repository stands on the site; `relink` rewrites the links by it. Equations become MathML while the site is built,
so that a page needs no script and no other host to show them.
"""

from __future__ import annotations

import html
import posixpath
import re
import sys
from collections.abc import Callable
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

import api_pages
import code_links

ROOT = Path(__file__).resolve().parents[2]
NATIVE = "src/nestling/ops/native/README.md"
PICTURES = {".svg", ".png"}
RENAMED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
    NATIVE: "native.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
MATH = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Results, reproductions and the API join the navigation."""
    reproductions = [{_title(ROOT / path): place(path)} for path in _outside() if path.endswith("/RESULTS.md")]
    pages = [{name: path} for path, name in api_pages.pages(ROOT).items()]
    assert config.nav is not None
    results = {"Results": [{"The papers' claims": "results.md"}, *reproductions]}
    config.nav += [results, {"API": [{"Where to begin": "api/index.md"}, *pages]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what stands outside docs/."""
    for path in _outside():
        source = ROOT / path
        if source.suffix == ".py":
            title = f"# {path}\n\n"
            files.append(File.generated(config, place(path), content=f"{title}```python\n{source.read_text()}```\n"))
        else:
            files.append(File.generated(config, place(path), abs_src_path=str(source)))
    for path in api_pages.pages(ROOT):
        files.append(File.generated(config, path, content=api_pages.page(ROOT, path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository become links of the site, and names of functions links to the API."""
    here = page.file.src_uri
    if here == "paper_map.md":
        markdown = code_links.link(markdown, ROOT)
    return _outside_code(markdown, lambda text: relink(text, origin(here)))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """LaTeX to MathML."""
    return MATH.sub(_mathml, content)


def place(path: str) -> str:
    """Where a file of the repository stands on the site; the path itself for a page under docs/."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("examples/") and path.endswith(".py"):
        return path.removesuffix(".py") + ".md"
    return RENAMED.get(path, path)


def origin(page: str) -> str:
    """Where a page of the site comes from: the way back of `place`."""
    for source, target in RENAMED.items():
        if page == target and source != "README.md":
            return source
    if page.startswith("examples/"):
        return page.removesuffix(".md") + ".py"
    return page if page.startswith("reproductions/") else f"docs/{page}"


def relink(markdown: str, source: str) -> str:
    """Relative links of a file of the repository, for the site; a link to what is not on the site becomes its text."""
    shown = {*_outside(), *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*") if p.is_file())}
    shown |= {f"docs/{path}" for path in api_pages.pages(ROOT)} | {"README.md"}

    def one(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        path, _, anchor = target.partition("#")
        found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if found not in shown:
            found = next((f"{found}/{name}" for name in ("RESULTS.md",) if f"{found}/{name}" in shown), "")
        if not found:
            return str(text)
        link = posixpath.relpath(place(found), posixpath.dirname(place(source)) or ".")
        return f"{picture}[{text}]({link}{'#' + anchor if anchor else ''})"

    return LINK.sub(one, markdown)


def _outside() -> list[str]:
    """Files of the repository that are shown although they do not lie in docs/."""
    found = ["CONTRIBUTING.md", "CHANGELOG.md", NATIVE]
    for folder in sorted((ROOT / "reproductions").iterdir()):
        found += [f"reproductions/{folder.name}/{p.name}" for p in sorted(folder.glob("*")) if _shown(p)]
    found += [str(p.relative_to(ROOT)) for p in sorted((ROOT / "examples").rglob("*.py"))]
    return found


def _shown(path: Path) -> bool:
    return path.suffix == ".md" or path.suffix in PICTURES


def _title(path: Path) -> str:
    """The first heading of a page."""
    heading = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return heading.group(1) if heading else path.parent.name


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Apply a change to everything but fenced code."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def _mathml(match: re.Match[str]) -> str:
    """One equation: pymdownx.arithmatex puts LaTeX between brackets or parentheses with a backslash."""
    latex = html.unescape(match.group(2)).strip()
    display = "block" if latex.startswith("\\[") else "inline"
    shown = convert(latex[2:-2].strip(), display=display)
    if "\\" in shown:  # a command that the converter does not know is left in the text
        raise PluginError(f"this LaTeX cannot be shown: {latex}")
    return shown
