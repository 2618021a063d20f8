"""Text of unknown origin."""

from __future__ import annotations

from nestling.printing import one_line, printable, short


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    assert printable("a\x1b[31m\x07\x9b2J\x7f\r\n\té\N{GRINNING FACE}") == "a�[31m��2J��\n\té\N{GRINNING FACE}"
    assert printable("caf\udce9").encode() == "caf�".encode()
    assert one_line("a\nb\tc\x1b") == "a b c�"


def test_short_keeps_both_ends() -> None:
    assert short("x" * 200) == "x" * 200
    cut = short("a" * 1000 + "z" * 1000)
    assert len(cut) == 200 and cut.startswith("a" * 100) and cut.endswith("z" * 99) and cut[100] == "…"
    assert short("abcdef", 3) == "a…f" and short("abcdef", 2) == "a…" and short("abcdef", 1) == "…"
