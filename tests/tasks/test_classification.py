"""Classification sets are read, split and cut into tasks; what cannot be read is refused with a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nestling.errors import UserError
from nestling.tasks.classification import (
    class_tasks,
    joined,
    read_clinc150,
    read_csv,
    read_dbpedia70,
    split_rows,
    synthetic_set,
)


def clinc(folder: Path) -> Path:
    names = ["report_lost_card", "pto_request", "weather"]
    parts = {
        part: [[f"{part} text {i} of {name}", name] for name in names for i in range(n)]
        for part, n in (("train", 4), ("val", 2), ("test", 3))
    }
    parts["test"].append(["train text 0 of weather", "weather"])
    parts["oos_test"] = [["what is love", "oos"]]
    (folder / "data_full.json").write_text(json.dumps(parts))
    return folder


def test_clinc150(tmp_path: Path) -> None:
    data = read_clinc150(clinc(tmp_path))
    assert data.labels == ("pto request", "report lost card", "weather")
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 6, 9)  # the text learned is not asked
    assert all(data.labels[x.label].replace(" ", "_") in x.text for x in (*data.train, *data.validation, *data.test))
    assert read_clinc150(tmp_path / "data_full.json") == data


@pytest.mark.parametrize("content", ["{", "[]", '{"train": []}', '{"train": [[1]], "val": [], "test": []}'])
def test_clinc150_of_another_layout(content: str, tmp_path: Path) -> None:
    (tmp_path / "data_full.json").write_text(content)
    with pytest.raises(UserError, match=r"not CLINC150's data_full\.json"):
        read_clinc150(tmp_path)


def test_dbpedia_pools_files_and_names_classes(tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text("".join(f'1,SportsTeam_member,"text, {i}"\n' for i in range(10)))
    (tmp_path / "test.csv").write_text("".join(f"1,31,other {i}\n" for i in range(5)) + "1,7,alone\n")
    data = read_dbpedia70(tmp_path)
    assert data.labels == ("31", "Sports Team member")  # one text cannot be learned and asked
    assert (len(data.train), len(data.validation), len(data.test)) == (9, 3, 3)
    texts = [x.text for x in (*data.train, *data.validation, *data.test)]
    assert len(set(texts)) == 15 and "text, 3" in texts
    assert all((x.label == 1) == x.text.startswith("text") for x in data.test)


def test_dbpedia_of_another_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no CSV file"):
        read_dbpedia70(tmp_path)
    (tmp_path / "a.csv").write_text("1,2,a text\n1,2\n")
    with pytest.raises(UserError, match="line 2: 2 columns"):
        read_dbpedia70(tmp_path)


def test_any_csv(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    rows = [f'{i},{"card_arrival" if i % 2 else "pin"},"say ""{i}"", please"' for i in range(12)]
    file.write_text("\ufeffid,label,text\n" + "\n".join(rows) + "\n", encoding="utf-8")
    data = read_csv(file)
    assert data.name == "mine" and data.labels == ("card arrival", "pin")
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 2, 2)
    assert 'say "3", please' in [x.text for x in (*data.train, *data.validation, *data.test)]
    assert read_csv(file) == data != read_csv(file, seed=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no columns text and label"),
        ("text,class\na,b\n", "no columns text and label"),
        ("text,label\na,b,c\n", "line 2: 3 columns"),
        ("text,label\na,x\nb,x\n", "has 1 classes"),
        ("text,label\na,x_1\nb,x_1\nc,x 1\nd,x 1\n", "differ in underscores"),
        ('text,label\n"a"b,x\n', "line 2"),
    ],
)
def test_csv_that_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        read_csv(tmp_path / "mine.csv")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_csv(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"text,label\n\xe9,a\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_csv(tmp_path / "latin.csv")


def test_split_takes_a_fifth_of_every_class_and_no_text_twice() -> None:
    counts = {"a": 25, "b": 10, "c": 3, "d": 2, "e": 1}
    pairs = [(f"{c}{i}", c) for c, n in counts.items() for i in range(n)]
    parts = split_rows([*pairs, *pairs], 0)
    found = {part: {c: sum(label == c for _, label in rows) for c in counts} for part, rows in parts.items()}
    assert found["test"] == {"a": 5, "b": 2, "c": 1, "d": 1, "e": 0}
    assert found["val"] == {"a": 5, "b": 2, "c": 1, "d": 0, "e": 0}
    assert found["train"] == {"a": 15, "b": 6, "c": 1, "d": 1, "e": 0}
    texts = [text for rows in parts.values() for text, _ in rows]
    assert len(set(texts)) == len(texts)


def test_tasks_have_their_own_classes_and_limits() -> None:
    data = synthetic_set(8, 20)
    tasks = class_tasks(data, 3, 0, train_limit=5, test_limit=2)
    assert [len(task.classes) for task in tasks] == [3, 3, 2]
    assert sorted(c for task in tasks for c in task.classes) == list(range(8))
    for task in tasks:
        assert [sum(x.label == c for x in task.train) for c in task.classes] == [5] * len(task.classes)
        assert [sum(x.label == c for x in task.test) for c in task.classes] == [2] * len(task.classes)
        assert {x.label for x in task.train} == set(task.classes)
    assert [x.label for x in tasks[0].train] != sorted(x.label for x in tasks[0].train)


def test_validation_has_another_order_and_other_questions() -> None:
    data = synthetic_set(8, 20)
    test, validation = (class_tasks(data, 2, 0, part=part) for part in ("test", "validation"))
    assert [t.classes for t in test] != [t.classes for t in validation]
    asked = [{x.text for task in tasks for x in task.test} for tasks in (test, validation)]
    assert asked[0] and asked[1] and not asked[0] & asked[1]
    assert class_tasks(data, 2, 0) == test != class_tasks(data, 2, 1)


def test_joined_is_all_in_one() -> None:
    tasks = class_tasks(synthetic_set(4, 10), 2, 0)
    (whole,) = joined(tasks)
    assert whole.classes == tuple(c for t in tasks for c in t.classes)
    assert sorted(x.text for x in whole.train) == sorted(x.text for t in tasks for x in t.train)
    assert whole.test == tuple(x for t in tasks for x in t.test)
    assert [x.label for x in whole.train] != [x.label for t in tasks for x in t.train]


def test_sizes_out_of_range() -> None:
    data = synthetic_set(4, 10)
    with pytest.raises(ValueError, match="size"):
        class_tasks(data, 0, 0)
    with pytest.raises(ValueError, match="test_limit"):
        class_tasks(data, 1, 0, test_limit=0)
    with pytest.raises(ValueError, match="between 2 and"):
        synthetic_set(13)
