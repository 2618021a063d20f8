"""Questions about real texts, on small ones of our own."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestling.errors import UserError
from nestling.tasks.knowledge import dictionary_material, name_material, story_material
from nestling.tasks.knowledge.words import HE, SHE
from nestling.tasks.text import Document

ENTRIES = "ID,Headword\na,kaba\nb,lut\nc,mira\nd,=at\ne,Ø\nf,son\ng,ton\nh,two\n"
SENSES = (
    'Entry_ID,Description\na,stone\nb,"to go, to leave"\nc,star\nd,object marker\ne,to give\nf,child\ng,child\n'
    "h,[filler]\ni,of nothing\na2,x\n"
)
BOOK = Document(
    "book",
    "Long ago there was a man whose name was Orlen. It was cold. The old woman who lived there called for Mira.\n\n"
    "Nobody in the house had ever seen Orlen or heard of him. On that evening they all went out with Mira again; "
    "and Orlen stayed. Then they came home and asked for Mira. What a rose, a Rose, and a Rose, my Rose, was that!",
)
STORIES = (
    "1 Mary went to the hall.\n2 John went to the garden.\n3 Where is Mary? \thall\t1\n4 Mary went to the kitchen.\n"
    "5 Where is Mary? \tkitchen\t4\n6 John went away.\n"
    "1 Fred gave the milk to Mary.\n2 Who gave the milk to Mary? \tFred\t1\n"
    "1 John got the milk.\n2 Where is the milk? \thall\t1\n"
)


@pytest.fixture
def dictionary(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "entries.csv", tmp_path / "senses.csv"
    for path, text in zip(paths, (ENTRIES, SENSES), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def test_words_with_one_meaning_of_their_own_are_asked_both_ways(dictionary: tuple[Path, Path]) -> None:
    found = dictionary_material(*dictionary, "Kaba")
    assert [d.text for d in found.documents] == [
        "In Kaba, the word “kaba” means “stone”.",
        "In Kaba, the word “lut” means “to go, to leave”.",
        "In Kaba, the word “mira” means “star”.",
    ]
    there, back = found.questions[:2]
    assert (there.kind, there.prompt, there.answer) == ("meaning", "What does the Kaba word “kaba” mean?", "stone")
    assert (back.kind, back.prompt, back.answer) == ("word", "What is the Kaba word for “stone”?", "kaba")
    assert set(there.choices) == {"stone", "to go, to leave", "star"} and there.asks and back.asks
    assert there.documents == ("Kaba: kaba",) and len(dictionary_material(*dictionary, "Kaba", 2).documents) == 2


def test_dictionaries_that_are_none_are_refused(dictionary: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column Description"):
        dictionary_material(dictionary[0], dictionary[0], "Kaba")
    with pytest.raises(UserError, match="cannot read"):
        dictionary_material(tmp_path / "nothing.csv", dictionary[1], "Kaba")
    dictionary[1].write_text("Entry_ID,Description\na,stone\n")
    with pytest.raises(UserError, match="fewer than two words"):
        dictionary_material(*dictionary, "Kaba")


def test_sentences_lead_to_names_and_to_no_other_capital() -> None:
    found = name_material(BOOK)
    assert {q.answer for q in found.questions} == {"Orlen", "Mira"} and found.documents == (BOOK,)
    assert [(q.prompt, q.answer) for q in found.questions[:2]] == [
        ("Long ago there was a man whose name was", "Orlen"),
        ("The old woman who lived there called for", "Mira"),
    ]
    text = " ".join(BOOK.text.split())
    assert all(f"{q.prompt} {q.answer}" in text and set(q.choices) == {"Orlen", "Mira"} for q in found.questions)
    assert len(name_material(BOOK, 2).questions) == 2
    with pytest.raises(UserError, match="fewer than two names"):
        name_material(Document("short", "no names here"))


def test_stories_have_people_of_their_own_and_their_last_question(tmp_path: Path) -> None:
    path = tmp_path / "qa.txt"
    path.write_text(STORIES, encoding="utf-8")
    found = story_material(path)
    first, second = found.questions
    mary = first.subject
    assert first.prompt == f"Where is {mary}?" and first.answer == "kitchen" and first.documents == ("story 1",)
    john = found.documents[0].text.split(" hall. ")[1].split(" went")[0]
    assert found.documents[0].text == f"{mary} went to the hall. {john} went to the garden. {mary} went to the kitchen."
    assert second.prompt == f"Who gave the milk to {second.subject}?" and second.answer not in (mary, john)
    assert found.documents[1].text == f"{second.answer} gave the milk to {second.subject}."
    assert set(second.choices) == {second.answer, mary, john}  # of both stories, and nobody whom the question names
    assert not any(name in d.text for d in found.documents for name in ("Mary", "John", "Fred"))
    assert len(story_material(path, 1).questions) == 1
    assert mary.split()[0] in SHE and john.split()[0] in HE  # whom the stories' she and he fit


def test_there_are_names_for_all_stories_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "qa.txt"
    path.write_text(STORIES.rpartition("1 John")[0] * 700, encoding="utf-8")
    found = story_material(path)
    assert len({q.subject for q in found.questions}) == 1400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Mary went.\n", "line 1: no number"),
        ("1 John got it.\n2 Where is it? \thall\t1\n", "names a person"),
        ("", "names a"),
    ],
)
def test_other_files_are_no_stories(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "qa.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        story_material(tmp_path / "qa.txt")
    with pytest.raises(UserError, match="cannot read"):
        story_material(tmp_path / "none.txt")
