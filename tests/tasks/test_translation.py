from __future__ import annotations

from pathlib import Path

import pytest

from nestling.errors import UserError
from nestling.tasks.text import strip_gutenberg
from nestling.tasks.translation import Pair, as_text, read_aligned_pairs, read_cldf_pairs, split_pairs

HEADER = "ID,Primary_Text,Analyzed_Word,Translated_Text,alt_translation1\n"


def test_examples_of_a_dictionary(tmp_path: Path) -> None:
    file = tmp_path / "examples.csv"
    rows = ['1,"Ma  go,\nreba.",,He goes.,Dia pergi.', "2,Tok,,,", "3,,,Nothing.,", '4,"Ma go, reba.",,He goes.,other']
    file.write_text(HEADER + "\n".join(rows), encoding="utf-8")
    assert read_cldf_pairs(file) == [Pair("Ma go, reba.", "He goes.")]
    assert as_text(read_cldf_pairs(file)) == "Ma go, reba. = He goes.\n"


@pytest.mark.parametrize(("text", "said"), [("a,b\n1,2\n", "no columns"), (HEADER + "1,x,,,\n", "no sentence")])
def test_other_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "examples.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        read_cldf_pairs(tmp_path / "examples.csv")
    with pytest.raises(UserError, match="cannot read"):
        read_cldf_pairs(tmp_path / "missing.csv")


def test_aligned_lines(tmp_path: Path) -> None:
    for name, text in {"a": "eins\nzwei\n", "b": "one\ntwo\n", "c": "drei\n", "d": "three\n", "e": "x\n\n\n"}.items():
        (tmp_path / name).write_text(text)
    found = read_aligned_pairs([tmp_path / "a", tmp_path / "c"], [tmp_path / "b", tmp_path / "d"])
    assert found == [Pair("eins", "one"), Pair("zwei", "two"), Pair("drei", "three")]
    with pytest.raises(UserError, match=r"2 lines and .* 3"):
        read_aligned_pairs([tmp_path / "a"], [tmp_path / "e"])


def test_training_shares_no_sentence_with_the_test() -> None:
    pairs = [Pair(f"s{i % 17}", f"e{i % 23}") for i in range(60)]
    train, test = split_pairs(pairs, 10, seed=3)
    assert len(test) == 10 and train
    assert not {p.source for p in train} & {p.source for p in test}
    assert not {p.english for p in train} & {p.english for p in test}
    assert (train, test) == split_pairs(pairs, 10, seed=3) != split_pairs(pairs, 10, seed=4)
    with pytest.raises(ValueError, match="from 1 to 59"):
        split_pairs(pairs, 60, seed=0)


@pytest.mark.parametrize("stars", ["*** ", "***"])
def test_a_book_without_its_publishers_notes(stars: str) -> None:
    ends = [
        f"{stars}{word} OF TH{kind} PROJECT GUTENBERG EBOOK IT ***" for word, kind in (("START", "IS"), ("END", "E"))
    ]
    book = f"Title\r\n{ends[0]}\n\nIt was ***\nthe best.\n\n{ends[1]}\nLicence\n"
    assert strip_gutenberg(book.replace("\r", "")) == "It was ***\nthe best.\n"
    assert strip_gutenberg("Plain text. ***\n") == "Plain text. ***\n"
