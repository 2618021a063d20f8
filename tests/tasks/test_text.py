"""Readers of text: what is read, how it is split, and what is said when it cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nestling.errors import UserError
from nestling.tasks.text import Document, embedded_corpus, hold_out, open_stream, read_documents


def test_directory_is_read_in_sorted_order_without_hidden_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_bytes(b"\xef\xbb\xbffirst\r\n")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text("")
    assert [d.text for d in read_documents(tmp_path)] == ["first\r\n", "second"]
    assert read_documents(tmp_path / "b.txt") == [Document(str(tmp_path / "b.txt"), "second")]


def test_memories_are_no_text(tmp_path: Path) -> None:
    """Known by their index; a memory.json of anything else is a text as any other."""
    for folder, text in (("book", '{"format": "nestling-memory"}'), ("mine", '{"format": "diary"}'), ("cut", '{"for')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.json").write_text(text)
        (tmp_path / folder / "note.txt").write_text(folder)
    (tmp_path / "book" / "snapshot-0001.safetensors").write_bytes(b"\xff")
    (tmp_path / "z.txt").write_text("last")
    assert [d.text for d in read_documents(tmp_path)] == ['{"for', "cut", '{"format": "diary"}', "mine", "last"]
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    left = [d.text for d in read_documents(tmp_path, leave_out=tmp_path / "link")]
    assert left == ['{"for', "cut", "last"]
    assert read_documents(tmp_path / "mine", leave_out=tmp_path / "cut")[1].text == "mine"
    with pytest.raises(UserError, match="holds no text"):
        read_documents(tmp_path / "book")


def test_unreadable_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file or directory at .*nowhere; check the path"):
        read_documents(tmp_path / "nowhere")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        read_documents(tmp_path / "blank.txt")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8 \(byte 0xe9 at offset 3\).*iconv"):
        read_documents(tmp_path)


def test_embedded_corpus_repeats_no_paragraph() -> None:
    paragraphs = [p.strip() for d in embedded_corpus() for p in d.text.split("\n\n") if p.strip()]
    assert sum(map(len, paragraphs)) > 250_000
    assert len(set(paragraphs)) == len(paragraphs)


def test_hold_out_is_the_contiguous_end_and_loses_nothing() -> None:
    documents = [Document("a", "x" * 500), Document("b", "line\n" * 100)]
    train, valid = hold_out(documents, 0.1)
    assert "".join(d.text for d in train + valid) == "".join(d.text for d in documents)
    assert [d.name for d in train] == ["a", "b"] and [d.name for d in valid] == ["b"]
    assert valid[0].text == "line\n" * 20
    assert hold_out([Document("a", "0123456789")], 0.3) == ([Document("a", "0123456")], [Document("a", "789")])


def test_too_little_to_hold_out() -> None:
    with pytest.raises(UserError, match="too short to hold out 10%"):
        hold_out([Document("tiny", "a")])
    with pytest.raises(ValueError, match="between 0 and 1"):
        hold_out([Document("a", "abc")], 1.5)


def test_stream_errors_say_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text(json.dumps({"body": "hello", "n": 1}) + "\n")
    with pytest.raises(UserError, match=r"no text column 'text'; choose with --column one of: body"):
        open_stream(str(tmp_path), None, "train", "text")
    with pytest.raises(UserError, match="cannot stream"):
        open_stream(str(tmp_path), None, "nosuchsplit", "body")
    assert next(iter(open_stream(str(tmp_path), None, "train", "body")))["body"] == "hello"
