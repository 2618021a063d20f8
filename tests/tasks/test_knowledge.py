"""Invented worlds: what the documents say is what the questions ask."""

from __future__ import annotations

from itertools import pairwise

import pytest

from nestling.tasks.knowledge import KINDS, NOT_TOLD, KnowledgeQuestion, World, ask_world, make_world
from nestling.tasks.knowledge.relations import RELATIONS

ALL = tuple(RELATIONS)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(30, attributes=ALL, changes=20, seed=3)


@pytest.fixture(scope="module")
def questions(world: World) -> list[KnowledgeQuestion]:
    return ask_world(world)


def text_of(world: World, name: str) -> str:
    return next(document.text for document in world.documents if document.name == name)


def test_every_fact_stands_in_its_document(world: World) -> None:
    for fact in world.facts:
        text = text_of(world, fact.document)
        assert fact.value in text and (not fact.old or fact.old in text)
    assert len({(fact.subject, fact.relation) for fact in world.facts}) == len(world.facts)


def test_people_have_every_attribute_and_what_they_name_is_told_of_too(world: World) -> None:
    people = [name for name in ALL if RELATIONS[name].subject == "person"]
    subjects = {fact.subject for fact in world.facts if fact.relation in people}
    assert len(subjects) == 30 and all(world.find(subject, name) for subject in subjects for name in people)
    for name, further in (("town", "craft"), ("heirloom", "maker")):
        assert all(world.find(fact.old or fact.value, further) for fact in world.facts if fact.relation == name)


@pytest.mark.parametrize("relation", ["town", "pet", "heirloom", "craft"])
def test_values_are_of_one_subject(world: World, relation: str) -> None:
    values = [value for fact in world.facts if fact.relation == relation for value in (fact.value, fact.old) if value]
    assert len(set(values)) == len(values) and world.values(relation) == list(dict.fromkeys(world.values(relation)))


def test_jobs_are_of_one_subject_too_while_there_are_enough() -> None:
    jobs = [fact.value for fact in make_world(88, attributes=("job",)).facts]
    assert len(set(jobs)) == 88
    assert len(make_world(200, attributes=("job",)).values("job")) == 88


def test_changes_stand_at_the_end_and_say_what_was(world: World) -> None:
    assert [document.name.split(":")[0] for document in world.documents[-20:]] == ["news"] * 20
    assert sum(bool(fact.old) for fact in world.facts) == 20
    for fact in world.facts:
        assert fact.document.startswith("news") == bool(fact.old) and fact.value != fact.old


def test_a_seed_is_a_world() -> None:
    assert make_world(5, seed=1) == make_world(5, seed=1) != make_world(5, seed=2)
    one, two = make_world(40, seed=1), make_world(40, seed=2)
    names, others = ({f.subject for f in world.facts if f.relation == "job"} for world in (one, two))
    assert len(names & others) < 5  # another user's world is of other people
    assert ask_world(one) == ask_world(one) and ask_world(one) != ask_world(one, seed=1)


def test_documents_vary() -> None:
    texts = [d.text for d in make_world(40).documents if d.name.startswith("person")]
    starts = {" ".join(text.split()[2:5]) for text in texts}
    assert len(starts) > 15 and any(" He " in text for text in texts) and any(" She " in text for text in texts)


def test_forty_people_are_120_facts() -> None:
    world = make_world(40, attributes=("town", "job", "pet"))
    assert len(world.facts) == 120 and len(world.documents) == 40


def test_every_kind_is_asked_with_the_right_answer_among_the_choices(
    world: World, questions: list[KnowledgeQuestion]
) -> None:
    assert list(dict.fromkeys(q.kind for q in questions)) == list(KINDS)
    for q in questions:
        assert 2 <= len(q.choices) <= 10 + (q.kind == "absence") and len(set(q.choices)) == len(q.choices)
        assert q.prompt[0].isupper() or not q.prompt[0].isalpha()
        assert "{" not in q.prompt and q.answer not in q.prompt
        told = " ".join(text_of(world, name) for name in q.documents)
        assert q.answer.lower() in told.lower() or (q.kind == "absence" and not q.documents and q.answer == NOT_TOLD)
        assert q.asks == (q.kind in ("question", "two hops", "absence", "update"))


def test_same_words_are_the_documents_and_a_paraphrase_is_not(world: World, questions: list[KnowledgeQuestion]) -> None:
    """The subject may stand there as she, her and so on."""
    for q in questions:
        if q.kind not in ("same words", "paraphrase"):
            continue
        text = text_of(world, q.documents[0])
        parts = q.prompt.replace(f"{q.subject}'s", "|").replace(q.subject, "|").split("|")
        inside = all(part.strip().lower() in text.lower() for part in parts)
        assert inside or q.kind == "paraphrase", (q.prompt, text)
        assert f"{q.prompt} {q.answer}" not in text or q.kind == "same words"


def test_two_hops_need_two_documents(world: World, questions: list[KnowledgeQuestion]) -> None:
    hops = [q for q in questions if q.kind == "two hops"]
    assert {q.relation for q in hops} >= {"town, craft", "heirloom, maker", "adviser, job"}
    for q in hops:
        first, second = (text_of(world, name) for name in q.documents)
        assert q.answer not in first and q.answer in second and q.subject in q.prompt


def test_a_change_is_asked_with_the_old_value_among_the_choices(
    world: World, questions: list[KnowledgeQuestion]
) -> None:
    changed = [fact for fact in world.facts if fact.old]
    asked = [q for q in questions if q.kind == "update"]
    assert [(q.subject, q.answer) for q in asked] == [(fact.subject, fact.value) for fact in changed]
    assert all(fact.old in q.choices for fact, q in zip(changed, asked, strict=True))
    others = [q for q in questions if q.kind in ("same words", "question", "paraphrase", "reversed")]
    assert not {(fact.subject, fact.relation) for fact in changed} & {(q.subject, q.relation) for q in others}


def test_absent_is_what_no_document_says(world: World, questions: list[KnowledgeQuestion]) -> None:
    absent = [q for q in questions if q.kind == "absence"]
    known = {fact.subject for fact in world.facts}
    for q in absent:
        assert (q.subject in known) == (q.relation not in RELATIONS)
        assert q.subject in world.strangers or q.subject in known
    assert not known & set(world.strangers) and {q.subject in known for q in absent} == {True, False}


def test_reversed_leads_to_one_subject() -> None:
    """A value of two subjects is not asked backwards."""
    world = make_world(200, attributes=("job", "pet"))
    asked = [q for q in ask_world(world, ["reversed"]) if q.relation == "job"]
    shared = [fact.value for fact in world.facts if fact.relation == "job"]
    assert len(asked) == sum(shared.count(value) == 1 for value in set(shared))


def test_right_answers_stand_anywhere(questions: list[KnowledgeQuestion]) -> None:
    places = [q.gold for q in questions if len(q.choices) == 10]
    assert all(places.count(place) > len(places) / 20 for place in range(10))


def test_choices_are_as_many_as_wanted(world: World) -> None:
    assert {len(q.choices) for q in ask_world(world, ["question"], choices=4)} == {4}
    every = [q for q in ask_world(world, ["question"], choices=None) if q.relation == "town"]
    assert {len(q.choices) for q in every} == {len(world.values("town"))}


def test_attributes_may_stand_in_any_order() -> None:
    orders = [make_world(3, attributes=names) for names in (("craft", "town"), ("town", "craft"))]
    assert all(len(world.facts) == 6 for world in orders)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"people": 1}, "2 to 500 people"),
        ({"people": 501}, "2 to 500 people"),
        ({"attributes": ()}, "one or more"),
        ({"attributes": ("town", "town")}, "each once"),
        ({"attributes": ("town", "car")}, "no 'car'"),
        ({"attributes": ("job", "craft")}, "'craft' is told of every place"),
        ({"people": 2, "attributes": ("adviser",), "changes": 1}, "3 or more"),
        ({"changes": 161}, "160 facts"),
        ({"changes": -1}, "between 0 and"),
    ],
)
def test_impossible_worlds_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_world(**arguments)  # type: ignore[arg-type]


def test_impossible_questions_are_refused(world: World) -> None:
    with pytest.raises(ValueError, match="no 'riddle'"):
        ask_world(world, ["riddle"])
    with pytest.raises(ValueError, match="at least 2"):
        ask_world(world, choices=1)


def test_nobody_whom_the_prompt_names_is_a_choice(world: World, questions: list[KnowledgeQuestion]) -> None:
    for q in questions:
        assert not any(choice in q.prompt for choice in q.choices if choice != q.answer), q
        middle = world.find(q.subject, q.relation.split(", ")[0])
        assert q.kind != "two hops" or middle is None or middle.value == q.answer or middle.value not in q.choices


def test_a_change_is_one_also_where_values_come_again() -> None:
    """More jobs are drawn than there are."""
    for seed in range(6):
        world = make_world(88, attributes=("job",), changes=60, seed=seed)
        assert all(fact.value != fact.old for fact in world.facts)
        assert all(len(set(q.choices)) == len(q.choices) for q in ask_world(world, ["update"]))


def test_the_largest_world_has_names_for_all() -> None:
    world = make_world(500, attributes=ALL, changes=1000)
    assert len({f.subject for f in world.facts}) == 1500
    assert all(a != b for a, b in pairwise(sorted(f.subject for f in world.facts if f.relation == "job")))
