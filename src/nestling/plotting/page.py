"""One HTML file with text, tables and charts inside; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #f4f5f7; color: #23272e; font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 20px; margin: 0 0 8px; }
.lead { color: #4a505a; margin: 0 0 28px; }
section { background: #fff; border: 1px solid #e2e5e9; border-radius: 10px; padding: 24px 28px; margin: 0 0 20px; }
p { margin: 8px 0; }
figure { margin: 16px 0 0; }
figure img { width: 100%; height: auto; }
figcaption { color: #5c626b; font-size: 14px; }
table { border-collapse: collapse; margin: 14px 0 4px; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; border-bottom: 1px solid #e8eaed; text-align: right; }
th { color: #5c626b; font-weight: 600; font-size: 14px; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f6f7f9; border-radius: 8px; padding: 14px 16px; white-space: pre-wrap; font-size: 13px; }
footer { color: #6b717b; font-size: 14px; }
"""


@dataclass(frozen=True)
class Chart:
    """An SVG document with a description for those who do not see it and a caption."""

    svg: str
    description: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page. Everything is plain text and is escaped, the chart's SVG apart.

    Attributes:
        title: heading.
        paragraphs: text.
        columns, rows: a table; no table without columns.
        charts: pictures, after the table.
        quote: text shown as it is, such as a model's output.
    """

    title: str
    paragraphs: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    charts: Sequence[Chart] = field(default=())
    quote: str = ""


def html_page(title: str, lead: str, sections: Sequence[Section], footer: str = "") -> str:
    """The whole document.

    Args:
        title: of the window and the page.
        lead: a sentence or two below the title.
        sections: in order.
        footer: small print.
    """
    body = "\n".join(_section(section) for section in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f'<p class="lead">{escape(lead)}</p>\n{body}\n<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n'
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>", *(f"<p>{escape(p)}</p>" for p in section.paragraphs)]
    if section.columns:
        parts.append(_table(section.columns, section.rows))
    parts.extend(_figure(chart) for chart in section.charts)
    if section.quote:
        parts.append(f"<pre>{escape(section.quote)}</pre>")
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _figure(chart: Chart) -> str:
    # As an image, so that the identifiers inside two SVG documents cannot meet.
    data = base64.b64encode(chart.svg.encode()).decode()
    caption = f"<figcaption>{escape(chart.caption)}</figcaption>" if chart.caption else ""
    return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{escape(chart.description)}">{caption}</figure>'
