"""Charts and pages."""

from __future__ import annotations

import base64
import re
from xml.etree import ElementTree

import pytest

from nestling.plotting.curves import Series, line_chart
from nestling.plotting.matrix import matrix_chart
from nestling.plotting.page import Chart, Section, html_page
from nestling.plotting.scatter import Point, scatter_chart


def chart(labels: tuple[str, ...] = ("first", "second")) -> str:
    """A small chart."""
    series = [Series(label, [0, 1, 2], [3.0, 2.0, 1.0 + i], i) for i, label in enumerate(labels)]
    return line_chart(series, x_label="bytes", y_label="nats")


def test_a_chart_is_svg_that_names_its_lines_and_axes() -> None:
    """It parses as XML and holds every label as text."""
    svg = chart()
    text = " ".join(ElementTree.fromstring(svg).itertext())
    for wanted in ("first", "second", "bytes", "nats"):
        assert wanted in text


def test_a_chart_depends_on_its_data_alone() -> None:
    """Equal data, equal file."""
    assert chart() == chart()
    assert chart() != chart(("first", "third"))


def test_a_chart_refuses_what_it_cannot_draw() -> None:
    """No lines, or x and y of different lengths."""
    with pytest.raises(ValueError, match="at least one series"):
        line_chart([], x_label="", y_label="")
    with pytest.raises(ValueError, match="'bent' has 1 x values and 2 y values"):
        line_chart([Series("bent", [1], [1, 2])], x_label="", y_label="")


def test_a_page_escapes_text_and_holds_its_charts() -> None:
    """Model output may contain markup; a chart comes back byte for byte."""
    svg = chart()
    section = Section("T", ["a < b"], ["col"], [["<i>"]], [Chart(svg, 'a "chart"')], quote="<script>x</script>")
    page = html_page("Title & more", "lead", [section], "end")
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "a &lt; b" in page and "&lt;i&gt;" in page and "Title &amp; more" in page
    found = re.search(r"base64,([A-Za-z0-9+/=]+)", page)
    assert found is not None and base64.b64decode(found[1]).decode() == svg


def test_scatter_has_a_panel_a_group_and_a_mark_a_name() -> None:
    points = [Point("one", "easy", 1.0, 10.0), Point("two", "easy", 100.0, 20.0), Point("one", "hard", 1.0, 5.0)]
    chart = scatter_chart(points, x_label="state, KiB", y_label="accuracy, %")
    for text in ("easy", "hard", "one", "two", "state, KiB", "accuracy, %"):
        assert f">{text}<" in chart
    assert chart == scatter_chart(points, x_label="state, KiB", y_label="accuracy, %")
    assert chart != scatter_chart(points, x_label="state, KiB", y_label="accuracy, %", y_range=(0, 100))
    with pytest.raises(ValueError, match="at least one point"):
        scatter_chart([], x_label="x", y_label="y")


def test_a_matrix_writes_its_values_and_leaves_blanks() -> None:
    """Percent in the fields, nothing for NaN, a panel a title."""
    rows = [[0.25, float("nan")], [0.5, 1.0]]
    svg = matrix_chart({"levels": rows, "means": rows}, x_label="asked", y_label="after")
    texts = [text.strip() for text in ElementTree.fromstring(svg).itertext() if text.strip()]
    for wanted, count in (("25", 2), ("50", 2), ("100", 2), ("levels", 1), ("means", 1), ("asked", 2), ("nan", 0)):
        assert texts.count(wanted) == count
    with pytest.raises(ValueError, match="at least one matrix"):
        matrix_chart({}, x_label="", y_label="")
