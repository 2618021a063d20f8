"""Check that a built site loads nothing from another host: `python docs/site/check_site.py site`."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# What a browser fetches by itself. `a href` is followed by readers only.
LOADS = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "object": "data",
    "embed": "src",
    "use": "href",
}
HARMLESS_LINKS = {"canonical", "prev", "next", "alternate"}
ELSEWHERE = re.compile(r"^(?:[a-z]+:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


class _Page(HTMLParser):
    """Collects what a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One element."""
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and HARMLESS_LINKS & set(values.get("rel", "").split()):
            return
        target = values.get(LOADS.get(tag, ""), "")
        if ELSEWHERE.match(target):
            self.found.append(f"<{tag}> {target}")
        self.found += IN_STYLE.findall(values.get("style", ""))


def loads_elsewhere(folder: Path) -> list[str]:
    """Every resource of another host that a page or a style sheet of `folder` loads, with the file."""
    found = []
    for path in sorted(folder.rglob("*.html")):
        text = path.read_text(encoding="utf-8")
        page = _Page()
        page.feed(text)
        found += [f"{path.relative_to(folder)}: {what}" for what in [*page.found, *IN_STYLE.findall(text)]]
    for path in sorted(folder.rglob("*.css")):
        what = IN_STYLE.findall(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(folder)}: {url}" for url in what]
    return found


def main() -> int:
    """0 if the site stands alone."""
    folder = Path(sys.argv[1])
    if not (folder / "index.html").exists():
        print(f"{folder} holds no site: build it with `make docs`.")
        return 1
    found = loads_elsewhere(folder)
    for line in found:
        print(line)
    print(f"{len(found)} resources of other hosts in {folder}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
