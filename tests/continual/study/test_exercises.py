"""Exercises made of a text."""

from __future__ import annotations

import random
import re

import pytest
import torch

from nestling.continual.study.curriculum import Curriculum
from nestling.continual.study.exercises import (
    LONGEST,
    Exercise,
    exercises,
    gaps,
    name_in,
    passages,
    sentences,
    subject,
)
from nestling.continual.study.lessons import make_lessons, of_others, split_by, tell
from nestling.training.tokenization import byte_tokenizer

TEXT = "The door with Vera Sorborg's name on it is in Askside. She keeps a shy owl."


def of(kind: str, text: str) -> list[tuple[str, str]]:
    return [(each.prompt, each.answer) for each in exercises(text) if each.kind == kind]


def asked(text: str) -> str:
    return f"Question: {text}?\nAnswer:"


def test_every_sentence_names_whom_it_is_about() -> None:
    assert of("passage", TEXT) == [("", TEXT)]
    assert of("sentence", TEXT) == [
        ("", "The door with Vera Sorborg's name on it is in Askside."),
        ("", "Vera Sorborg keeps a shy owl."),
    ]


def test_words_are_asked_for_and_lead_back_to_the_name() -> None:
    found = of("gap", TEXT)
    assert (asked("Vera Sorborg keeps what"), "a shy owl") in found
    assert (asked("The door with Vera Sorborg's name on it is in what"), "Askside") in found
    assert of("name", TEXT) == [
        (asked("The door with whose name on it is in Askside"), "Vera Sorborg"),
        (asked("Who keeps a shy owl"), "Vera Sorborg"),
    ]
    assert ("a shy owl:", "Vera Sorborg") in of("index", TEXT)


def test_a_text_without_names_has_passages_and_gaps() -> None:
    found = exercises("water boils at one hundred degrees")
    assert {each.kind for each in found} == {"passage", "gap"}
    assert Exercise("gap", asked("what at one hundred degrees"), "water boils") in found


def test_a_text_without_words_has_a_passage_alone() -> None:
    assert [each.kind for each in exercises("... 。")] == ["passage"]
    assert exercises(" \n\n ") == []


@pytest.mark.parametrize(
    "text, name",
    [
        ("Everyone there knows Anton Nardorf as an accountant.", "Anton Nardorf"),
        ("At Sonja Corrand's feet sleeps a beetle.", "Sonja Corrand"),
        ("The old mill stands by Bristol.", "Bristol"),
        ("Nothing is known of it.", None),
        ("Tomorrow comes. Tomorrow goes.", "Tomorrow"),
        ("Water boils.", None),
        ("In 1815 Ludwig van Horn left.", "Ludwig van Horn"),
    ],
)
def test_the_name_that_a_passage_is_about(text: str, name: str | None) -> None:
    assert subject(text) == name


@pytest.mark.parametrize(
    "sentence, named",
    [
        ("He works.", "Vera works."),
        ("His trade is hard.", "Vera's trade is hard."),
        ("Everyone knows him as a judge.", "Everyone knows Vera as a judge."),
        ("Vera said he works.", "Vera said he works."),
        ("It rains.", "It rains."),
    ],
)
def test_a_pronoun_gives_way_to_the_name(sentence: str, named: str) -> None:
    assert name_in(sentence, "Vera") == named


def test_sentences_do_not_end_at_titles() -> None:
    assert sentences("Mr. Hale came. “Who?” she said. He left!") == ["Mr. Hale came.", "“Who?” she said.", "He left!"]


def test_gaps_are_runs_of_words_that_say_something() -> None:
    assert [words for _, words, _ in gaps("Vera keeps a shy, grey owl in the old mill.", "Vera")] == [
        "keeps",
        "a shy",
        "grey owl",
        "the old mill",
    ]


def test_long_paragraphs_are_cut_between_sentences_and_long_sentences_between_words() -> None:
    long = " ".join(["It was so."] * 300)
    found = passages(f"{long}\n\nshort\n  line\n\n{'word ' * 600}\n\n{'x' * 3000}")
    assert all(len(each) <= LONGEST for each in found)
    assert "short line" in found and all(each.endswith(".") for each in found[:3])
    assert " ".join(found).split()[: 3 * 300] == long.split()


def test_questions_with_two_answers_are_no_lessons() -> None:
    texts = ["Vera Sorborg works as a judge.", "Emil Morby works as a judge."]
    lessons = make_lessons(tell(texts), byte_tokenizer(), 512)
    said = [bytes(i - 3 for i in each.piece.ids.tolist()).decode() for each in lessons]
    assert not any("Who works as a judge" in text for text in said)
    assert sum("works as what" in text for text in said) == 2
    assert {each.text for each in lessons} == {0, 1} == {each.passage for each in lessons}


def test_the_answer_alone_is_learned_and_its_end() -> None:
    lesson = next(each for each in make_lessons(tell([TEXT]), byte_tokenizer(), 512) if each.exercise.kind == "name")
    answer = bytes(i - 3 for i in lesson.piece.ids[lesson.piece.start :].tolist()).decode()
    assert answer == " Vera Sorborg\n" and int(lesson.piece.targets.sum()) == len(answer)
    right = lesson.piece.targets.clone()
    assert lesson.done(right)
    right[0] = False
    assert not lesson.done(right)


def test_what_is_read_counts_as_known_before_its_first_words_do() -> None:
    lesson = make_lessons(tell([TEXT]), byte_tokenizer(), 512)[0]
    right = lesson.piece.targets[1:].clone()
    assert lesson.exercise.kind == "passage" and int(lesson.piece.targets.sum()) == len(right)
    right[:10] = False
    assert lesson.done(right)
    right[:30] = False
    assert not lesson.done(right)


def test_the_same_is_said_of_others_where_a_name_is_in_what_is_read() -> None:
    tokenizer = byte_tokenizer()
    lessons = make_lessons(tell([TEXT, "water boils"]), tokenizer, 512)
    pieces = of_others(lessons, 99, tokenizer, 512, random.Random(0))
    said = [bytes(i - 3 for i in piece.ids.tolist()).decode() for piece in pieces]
    named = [each for each in lessons if each.exercise.kind in ("passage", "sentence", "gap") and each.text == 0]
    assert len(said) == len(named) and not any("Sorborg" in each for each in said)
    assert any(re.fullmatch(r"Question: \w+ \w+ keeps what\?\nAnswer: a shy owl", each) for each in said)
    assert all(int(piece.targets.sum()) == len(piece.ids) - 1 for piece in pieces)
    other = of_others(lessons, 99, tokenizer, 512, random.Random(1))
    assert len(of_others(lessons, 2, tokenizer, 512, random.Random(0))) == 2
    assert {tuple(p.ids.tolist()) for p in other} != {tuple(p.ids.tolist()) for p in pieces}
    assert of_others(lessons[-2:], 4, tokenizer, 512, random.Random(0)) == []


def test_nothing_to_study() -> None:
    with pytest.raises(ValueError, match="no document has a word"):
        make_lessons(tell(["  "]), byte_tokenizer(), 512)


def test_a_special_token_in_a_text_is_text() -> None:
    lessons = make_lessons(tell(["Vera said <eos> to Emil Morby."]), byte_tokenizer(), 512)
    assert all(byte_tokenizer().eos_token_id not in each.piece.ids.tolist() for each in lessons)


def test_losses_are_parted_by_lesson() -> None:
    lessons = make_lessons(tell([TEXT]), byte_tokenizer(), 512)[:3]
    counts = [int(each.piece.targets.sum()) for each in lessons]
    values = list(range(sum(counts)))
    found = [(lesson, part.tolist()) for lesson, part in split_by(lessons, torch.tensor(values))]
    assert [lesson for lesson, _ in found] == lessons
    assert [n for _, part in found for n in part] == values and [len(part) for _, part in found] == counts


def test_what_is_known_at_its_last_visit_counts() -> None:
    course = Curriculum([0, 0, 0, 1], most=2, seed=0)
    assert course.known == 0
    seen = dict.fromkeys(range(4), 0)
    for number in range(12):
        for exercise in course.round(number):
            seen[exercise] += 1
            course.saw(exercise, number, right=exercise < 2)
    assert seen[3] == 12 and sum(seen.values()) == 36 and min(seen.values()) >= 6 and course.known == 0.5
    course.saw(0, 12, right=False)
    assert course.known == 0.25


def test_the_passages_exercises_take_turns() -> None:
    course = Curriculum([0] * 10, most=4, seed=1)
    seen: set[int] = set()
    for number in range(3):
        chosen = course.round(number)
        assert len(chosen) == 4
        seen |= set(chosen)
        for exercise in chosen:
            course.saw(exercise, number, right=False)
    assert len(seen) == 10
    assert course.round(3) == Curriculum.round(course, 3)


def test_the_order_is_the_seeds() -> None:
    rounds = [Curriculum([0] * 20, most=20, seed=seed).round(0) for seed in (0, 0, 1)]
    assert rounds[0] == rounds[1] != rounds[2]
