"""What a later text tells otherwise, and what follows from two texts."""

from __future__ import annotations

import pytest

from nestling.continual.study.chains import FEW, MOST, chains
from nestling.continual.study.changes import amended
from nestling.continual.study.exercises import exercises, names_in, passages, subject
from nestling.continual.study.lessons import make_lessons, tell
from nestling.tasks.knowledge import make_world
from nestling.training.tokenization import byte_tokenizer

VERA = "Vera Sorborg lives in Askside. She works as a judge. Her companion is a shy owl."


@pytest.mark.parametrize(
    "later, old, new",
    [
        ("Vera Sorborg has left Askside and lives in Marham now.", "Askside", "Marham"),
        ("Vera Sorborg used to be a judge; today Vera Sorborg works as a baker.", "a judge", "a baker"),
        ("After the shy owl died, Vera Sorborg bought the tame hen.", "a shy owl", None),  # another article
        ("Vera Sorborg gave a shy owl to a friend and got an old toad.", "a shy owl", "an old toad"),
        ("Vera Sorborg no longer has a shy owl, but a toad.", "a shy owl", "a toad"),
    ],
)
def test_an_earlier_text_says_what_the_later_one_does(later: str, old: str, new: str | None) -> None:
    told = amended([VERA, later])
    assert told == [[VERA if new is None else VERA.replace(old, new)], [later]]


@pytest.mark.parametrize(
    "later",
    [
        "Vera Sorborg loves Askside and the sea.",  # nothing changes
        "Emil Morby has left Askside and lives in Marham now.",  # somebody else's
        "Vera Sorborg no longer sings.",  # not what the earlier text says
        "Vera Sorborg no longer lives in Askside.",  # and what holds now is not told
    ],
)
def test_what_does_not_change_it_leaves_it(later: str) -> None:
    assert amended([VERA, later])[0] == [VERA]


def test_only_later_texts_change_earlier_ones_one_after_the_other() -> None:
    first = "Vera Sorborg has left Askside and lives in Marham now."
    second = "Vera Sorborg has left Marham and lives in Thorn now."
    assert amended([first, VERA]) == [[first], [VERA]]
    told = amended([VERA, first, second])
    assert told[0] == [VERA.replace("Askside", "Thorn")] and told[2] == [second]


@pytest.mark.parametrize("seed", range(4))
def test_every_change_of_a_world_is_found_and_no_other(seed: int) -> None:
    world = make_world(12, changes=12, seed=seed)
    texts = [document.text for document in world.documents]
    told = dict(zip((d.name for d in world.documents), amended(texts, names_in(texts)), strict=True))
    for document in world.documents:
        own = [f for f in world.facts if document.name.endswith(f": {f.subject}")]
        text = document.text
        for fact in own:
            if fact.old:
                text = text.replace(fact.old, fact.value)
        if own:
            assert told[document.name] == passages(text)


def test_lessons_ask_for_what_holds_now() -> None:
    lessons = make_lessons(
        tell([VERA, "Vera Sorborg has left Askside and lives in Marham now."]), byte_tokenizer(), 512
    )
    asked = {each.exercise.prompt: each.exercise.answer for each in lessons}
    assert asked["Question: Vera Sorborg lives in what?\nAnswer:"] == "Marham"


def test_single_words_that_are_names() -> None:
    assert subject("Askside is known for its bells.") == "Askside"
    assert subject("Askside makes bells.") is None
    assert subject("Askside makes bells.", names_in(["Vera lives in Askside."])) == "Askside"
    assert subject("Water boils for Vera Sorborg.") == "Vera Sorborg"
    assert names_in(["Then Vera Sorborg's owl saw Emil. Water boils."]) == {"Emil"}


def test_another_who_shares_a_name_is_asked_for_whole() -> None:
    found = exercises("Nadia Hill lives here. Nadia Hill trusts Nadia Lanshaw, and Emil Hill.")
    assert {"Nadia Lanshaw", "Emil Hill"} <= {each.answer for each in found if each.kind == "gap"}


def test_chains_lead_over_a_name_without_saying_it() -> None:
    told = [(VERA, "Vera Sorborg"), ("People come to Askside for its bells. It is old.", "Askside"), ("Askside.", None)]
    found = chains(told, {})
    assert [(each.prompt, each.answer, each.about) for each in found[0]] == [
        (
            "Question: Vera Sorborg lives in something; people come to that for its what?\nAnswer:",
            "bells",
            "Vera Sorborg",
        )
    ]
    assert found[1] == found[2] == []
    many = [(VERA, "Vera Sorborg"), *[(f"Askside has {n} bells.", "Askside") for n in range(FEW + 1)]]
    assert not any(chains(many, {}))
    long = " ".join(f"Askside has red bells{n}." for n in range(MOST + 5))
    assert len(chains([(VERA, "Vera Sorborg"), (long, "Askside")], {})[0]) == MOST
    assert not chains([(VERA, "Vera Sorborg"), ("Vera Sorborg knows Askside.", "Askside")], {})[0]


def test_chains_lead_over_what_names_without_saying() -> None:
    told = [(VERA, "Vera Sorborg"), ("People come to Askside for its bells.", "Askside")]
    found = [(each.prompt, each.answer) for each in chains(told, {"Askside": ["town", "place"], "bells": ["sound"]})[0]]
    assert found[1:] == [
        (f"Question: People come to the {kind} of Vera Sorborg for its what?\nAnswer:", "bells")
        for kind in ("town", "place")
    ]
