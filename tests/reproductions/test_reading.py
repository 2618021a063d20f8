"""What the reading experiment measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nestling.continual.learner.learner import Learner
from nestling.continual.stream.scoring import read_frozen
from nestling.evaluation.choices import Question
from nestling.training.tokenization import byte_tokenizer
from reproductions.harness import stream_methods
from reproductions.harness.rows import Rows
from reproductions.harness.stream_methods import StreamModel, method_of
from reproductions.reading import experiment, progress
from reproductions.reading.report import make_report
from reproductions.reading.run import Plan
from tests.llamas import random_llama

SIZES = {"held": 8, "again": 8, "chunk": 8, "context": 16, "long": 32}


def second_half(losses: torch.Tensor) -> float:
    return float(losses[1:][len(losses[1:]) // 2 :].mean())


def small(results: Rows) -> experiment.Experiment:
    sizes, judges = experiment.Sizes(**SIZES), experiment.Judges()
    return experiment.Experiment(random_llama(), byte_tokenizer(), "m", sizes, judges, results)


def test_a_text_and_what_is_held_out(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "a.txt", byte_tokenizer()
    file.write_text("0123456789" * 4)
    for tokens, read, held in ((None, 32, 9), (10, 8, 10), (33, 32, 9), (38, 24, 17), (100, 24, 17)):
        sizes = experiment.Sizes(**SIZES | {"tokens": tokens, "held": 30 if held == 17 else 8})
        text = experiment.make_text(file, tokenizer, sizes)
        assert (len(text.ids), len(text.held), text.name) == (read, held, "a")
        start = tokenizer.decode(torch.cat([text.ids, text.held]))
        assert ("0123456789" * 4 + "\n").startswith(start)


@pytest.mark.parametrize("method", ["one_level+taught", "cms_2+sleep", "lora", "frozen"])
def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    model, draw = random_llama(), torch.Generator().manual_seed(2)
    parts = [torch.randint(3, 259, (n,), generator=draw) for n in (44, 8, 36, 8)]
    first, second = experiment.Text("a", *parts[:2]), experiment.Text("b", *parts[2:])
    monkeypatch.setattr(stream_methods, "STEP", 1)
    monkeypatch.setattr(progress, "SECONDS", 0.0)

    def row(folder: str) -> dict[str, object]:
        results = Rows(tmp_path / folder / "rows.jsonl")
        results.path.parent.mkdir(exist_ok=True)
        sizes, judges = experiment.Sizes(tokens=44, **SIZES), experiment.Judges(parts[3])
        made = experiment.Experiment(model, byte_tokenizer(), "m", sizes, judges, results)
        found = made.sequence(method, 0.0 if method == "frozen" else 1e-2, first, second)
        return {k: v for k, v in found.items() if "seconds" not in k}

    whole, observe, calls = row("whole"), Learner.observe, []

    def interrupted(self: Learner, *args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) in (4, 7, 9):  # in the first text, in the second one twice
            raise KeyboardInterrupt
        return observe(self, *args, **options)

    monkeypatch.setattr(Learner, "observe", interrupted)
    stops = 0
    while True:
        try:
            again = row("again")
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == (0 if method == "frozen" else 3)
    assert again == whole
    assert not list((tmp_path / "again").glob("cache/*"))


def test_a_sequence_by_hand(tmp_path: Path) -> None:
    model, tokenizer = random_llama(), byte_tokenizer()
    draw = torch.Generator().manual_seed(2)
    parts = [torch.randint(3, 259, (n,), generator=draw) for n in (24, 8, 16, 8)]
    first, second = experiment.Text("a", *parts[:2]), experiment.Text("b", *parts[2:])
    judges = experiment.Judges(parts[3], [("one", "two")], {"set": [Question(("q",) * 2, ("a", "b"), 1)]})
    results = Rows(tmp_path / "rows.jsonl")
    made = experiment.Experiment(model, tokenizer, "m", experiment.Sizes(tokens=24, **SIZES), judges, results, seed=3)

    reader = StreamModel(model, method_of("cms_2"), 1e-2, chunk=8, context=16, long=32, seed=3)
    halves = [second_half(reader.read(first.ids))]
    held = [[reader.score(first.held)]]
    halves.append(second_half(reader.read(second.ids)))
    held.append([reader.score(first.held), reader.score(second.held)])
    again, wikitext = reader.score(first.ids[:8]), reader.score(parts[3])
    reader.close()

    row = made.sequence("cms_2", 1e-2, first, second)
    assert row["second_halves"] == pytest.approx(halves, rel=1e-5)
    assert row["held"] == [pytest.approx(one, rel=1e-5) for one in held]
    assert (row["again"], row["wikitext"]) == pytest.approx((again, wikitext), rel=1e-5)
    assert row["lambada"]["items"] == row["choices"]["set"]["items"] == 1
    assert row["curves"][0][0] == [8, 15, 23]

    frozen = [second_half(read_frozen(model, ids, 16)) for ids in (first.ids, second.ids)]
    learning = sum(a - b for a, b in zip(halves, frozen, strict=True)) / 2
    keeping = held[1][0] - float(read_frozen(model, first.held, 16)[1:].mean())
    row = made.validation("cms_2", 1e-2, first, second)
    assert row["criterion"] == pytest.approx((learning + keeping) / 2, rel=1e-4)
    assert made.validation("frozen", 0.0, first, second)["criterion"] == 0

    finished = len(results.rows)
    again_made = experiment.Experiment(
        model, tokenizer, "m", experiment.Sizes(tokens=24, **SIZES), judges, Rows(results.path), seed=3
    )
    again_made.sequence("cms_2", 1e-2, first, second)
    assert len(again_made.results.rows) == finished == 3


def test_rates_are_chosen_by_the_criterion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Rows(tmp_path / "rows.jsonl")
    made = experiment.Experiment(
        random_llama(), byte_tokenizer(), "m", experiment.Sizes(**SIZES), experiment.Judges(), results
    )
    best = {"cms_2": 3e-3, "cms_2+gate": 1e-2, "cms_2+rank": 3e-5}
    asked: dict[str, set[float]] = {name: set() for name in best}

    def measured(method: str, rate: float, *texts: object) -> dict[str, float]:
        asked[method].add(rate)
        return {"criterion": abs(rate - best[method])}

    monkeypatch.setattr(made, "validation", measured)
    texts = [experiment.Text(name, torch.zeros(2), torch.zeros(2)) for name in "ab"]
    assert [made.chosen(name, *texts) for name in best] == list(best.values())
    assert asked["cms_2+gate"] == {3e-3, 1e-2} and len(asked["cms_2+rank"]) == 5
    assert made.chosen("frozen_long", *texts) == 0


def test_a_given_rate_is_measured_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(3, 259, (24,), generator=torch.Generator().manual_seed(2))
    one, other = experiment.Text("a", ids[:16], ids[16:]), experiment.Text("b", ids[4:20], ids[20:])
    results = Rows(tmp_path / "rows.jsonl")
    made = experiment.Experiment(
        random_llama(), byte_tokenizer(), "m", experiment.Sizes(**SIZES), experiment.Judges(), results
    )
    plan = Plan(made, [], (one, other), (other, one), "cms_2", 2e-3)
    plan.run(["frozen", "one_level"], ["sequence", "ablations"], ["even+split"])
    rows = [(row["part"], row["method"], row["rate"]) for row in results.rows]
    learned = [("validation", "one_level", 2e-3), ("sequence", "one_level", 2e-3)]
    learned += [("validation", "cms_2+even+split", 2e-3), ("sequence", "cms_2+even+split", 2e-3)]
    assert [row for row in rows if row[1] != "frozen"] == learned
    assert "`cms_2+even+split`" in make_report(results.rows).parts["rates"]
