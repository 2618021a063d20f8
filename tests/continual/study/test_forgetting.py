"""A memory that forgot a document is, to the last bit, the one that never read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestling.continual import Learner, Level, Memory, MemoryStore, Options, Rehearsal, Replay
from nestling.continual.learn_documents import Text, learn_text
from nestling.continual.study.forgetting import Forgetting, learn_again, plan_forgetting, save_forgotten
from nestling.errors import UserError
from tests.continual.models import assert_same
from tests.continual.stream.stream_models import text, tiny_llama

TEXTS = {name: Text(f"texts/{name}.txt", f"{name}{name}" * 32, text(150 + 7 * i, i)) for i, name in enumerate("abcd")}
EVERYTHING = Options(average=40, replay=Replay(teacher="average"), rehearsal=Rehearsal(pieces=3, length=8))
WAYS = {
    "plain": Options(),
    "rank": Options(rank=2),
    "everything": EVERYTHING,
    "replay": Options(replay=Replay(weight=0.5), retention=0.9),
}


def learner(options: Options = WAYS["plain"]) -> Learner:
    levels = {"fast": Level(16, ("*.1.mlp.*",)), "slow": Level(64, ("*.0.mlp.*",))}
    return Learner(tiny_llama(), levels, lr=0.01, context=24, options=options)


def read(
    store: MemoryStore, names: Sequence[str], options: Options = WAYS["plain"], stops: Sequence[int | None] = ()
) -> Memory:
    """Every text by a learner of its own that goes on from the memory, and is saved; some not to their end."""
    parts: dict[str, int] = {}
    for i, name in enumerate(names):
        one = learner(options)
        if store.exists():
            one.load(store.load())
        stop = stops[i] if i < len(stops) else None
        learn_text(one, TEXTS[name], parts.get(name, 0), None, stop=stop)
        parts[name] = stop or len(TEXTS[name].ids)
        store.save(one.memory(), f"read {name}")
    return store.load()


def forget(store: MemoryStore, *names: str) -> tuple[Forgetting, Memory]:
    plan = plan_forgetting(store, names)
    by_digest = {each.digest: each for each in TEXTS.values()}
    save_forgotten(store, plan, learn_again(tiny_llama(), store, plan, lambda record: by_digest[record.digest]))
    return plan, store.load()


def untimed(memory: Memory) -> Memory:
    return replace(memory, documents=[replace(d, started="") for d in memory.documents])


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("gone", ["a", "b", "c", "ac"])
def test_it_is_as_if_it_had_never_been_read(gone: str, way: str, tmp_path: Path) -> None:
    """The first, one in the middle, the last, several; with all that a learner can keep beside weights."""
    store = MemoryStore(tmp_path / "memory")
    before = read(store, "abc", WAYS[way])
    left = [name for name in "abc" if name not in gone]
    never = read(MemoryStore(tmp_path / "never"), left, WAYS[way])
    plan, found = forget(store, *(f"{name}.txt" for name in gone))
    assert_same(untimed(found), untimed(never))
    times = {d.digest: d.started for d in before.documents}
    assert [d.started for d in found.documents] == [times[d.digest] for d in found.documents]
    assert plan.begin is None if "a" in gone else plan.begin is not None
    with pytest.raises(AssertionError):
        assert_same(untimed(found), untimed(before))


def test_nothing_that_read_it_is_left(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "memory")
    read(store, "abc")
    store.rollback(1)
    read(store, "d")  # a branch that has not read b
    plan, _ = forget(store, "d.txt")
    assert plan.gone == (4,) and [s.number for s in store.index().snapshots] == [1, 2, 3, 5]
    store.rollback(3)
    plan, _ = forget(store, "texts/b.txt")
    assert plan.gone == (2, 3) and plan.begin is not None and plan.begin.number == 1
    left = store.index()
    assert [s.number for s in left.snapshots] == [1, 5, 6] and left.head == 6
    assert sorted(p.name for p in store.path.glob("snapshot-*")) == [f"snapshot-000{i}.safetensors" for i in (1, 5, 6)]
    assert not any(d.name == "texts/b.txt" for s in left.snapshots for d in store.load(s.number).documents)


def test_a_document_that_was_left_for_it_is_gone_on_with(tmp_path: Path) -> None:
    """a in two parts, with b between them: without b it is one document."""
    store, never = MemoryStore(tmp_path / "memory"), MemoryStore(tmp_path / "never")
    read(store, "abac", stops=(64, None, None, 96))
    read(never, "aac", stops=(64, None, 96))
    _, found = forget(store, "b.txt")
    assert_same(untimed(found), untimed(never.load()))
    assert [(d.name, d.finished) for d in found.documents] == [("texts/a.txt", True), ("texts/c.txt", False)]
    last = len(TEXTS["c"].ids)
    for place in (store, never):
        one = learner()
        one.load(place.load())
        learn_text(one, TEXTS["c"], 96, None)
        place.save(one.memory())
    assert store.load().documents[-1].tokens == last
    assert_same(untimed(store.load()), untimed(never.load()))


def test_several_read_in_one_go_are_read_again_from_before_them(tmp_path: Path) -> None:
    store, one = MemoryStore(tmp_path / "memory"), learner()
    for name in "abc":
        learn_text(one, TEXTS[name], 0, None)
    store.save(one.memory())
    plan, found = forget(store, "b.txt")
    assert plan.begin is None and [p.document.name for p in plan.again] == ["texts/a.txt", "texts/c.txt"]
    assert plan.tokens == len(TEXTS["a"].ids) + len(TEXTS["c"].ids)
    never = read(MemoryStore(tmp_path / "never"), "ac")
    for name, difference in never.differences.items():
        assert torch.equal(difference, found.differences[name])  # type: ignore[arg-type]


def test_what_was_rolled_back_is_forgotten_too(tmp_path: Path) -> None:
    """The head has not read it; a snapshot that it may go forward to has."""
    store = MemoryStore(tmp_path / "memory")
    before = read(store, "ab")
    store.rollback(1)
    plan, found = forget(store, "b.txt")
    assert plan.gone == (2,) and not plan.again and [s.number for s in store.index().snapshots] == [1, 3]
    assert [d.name for d in found.documents] == ["texts/a.txt"] and len(before.documents) == 2
    assert "b" not in store.head().note.replace("forgot a document", "")


def test_a_text_that_was_read_twice_is_read_again_twice(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "memory")
    for names in ("abca", "aca"):
        place = store if names == "abca" else MemoryStore(tmp_path / "never")
        one = learner()
        for name in names:
            learn_text(one, TEXTS[name], 0, None)
        place.save(one.memory())
    _, found = forget(store, "b.txt")
    assert_same(untimed(found), untimed(MemoryStore(tmp_path / "never").load()))


def test_memories_of_before_say_that_they_do_not_know(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "memory")
    memory = read(store, "a")
    del memory.settings["counters"]["consolidations"], memory.settings["counters"]["adopted"]
    store.save(memory)
    one = learner()
    one.load(store.load())
    learn_text(one, TEXTS["b"], 0, None)
    store.save(one.memory())
    assert one.counters.consolidations == one.counters.adopted == -1
    with pytest.raises(UserError, match=r"was begun with version 0\.2"):
        plan_forgetting(store, ["b.txt"])


def test_the_same_text_under_two_names_is_one(tmp_path: Path) -> None:
    store, one = MemoryStore(tmp_path / "memory"), learner()
    learn_text(one, TEXTS["a"], 0, None)
    learn_text(one, replace(TEXTS["a"], name="copy.txt"), 0, None)
    store.save(one.memory())
    plan, found = forget(store, "copy.txt")
    assert [d.name for d in plan.documents] == ["texts/a.txt", "copy.txt"] and not found.documents
    empty = MemoryStore(tmp_path / "empty")
    empty.save(learner().memory())
    assert_same(found, empty.load())


def test_a_digest_says_which(tmp_path: Path) -> None:
    store, one = MemoryStore(tmp_path / "memory"), learner()
    for name in "ab":
        learn_text(one, replace(TEXTS[name], name="same.txt"), 0, None)
    store.save(one.memory())
    with pytest.raises(UserError, match=r"same.txt names 2 texts .* aaaaaaaaaaaa, bbbbbbbbbbbb"):
        plan_forgetting(store, ["same.txt"])
    with pytest.raises(UserError, match=r"has read no document aaaaaaa; it has read same.txt"):
        plan_forgetting(store, ["aaaaaaa"])
    assert plan_forgetting(store, ["aaaaaaaa"]).digests == {TEXTS["a"].digest}


def test_what_cannot_be_read_again_is_refused(tmp_path: Path) -> None:
    store, one = MemoryStore(tmp_path / "memory"), learner()
    learn_text(one, TEXTS["a"], 0, None)
    store.save(one.memory())
    one.observe(text(50, 9))
    store.save(one.memory())
    learn_text(one, TEXTS["b"], 0, None)
    store.save(one.memory())
    with pytest.raises(UserError, match="50 tokens of no document"):
        plan_forgetting(store, ["a.txt"])
    assert not plan_forgetting(store, ["b.txt"]).again  # they came before it
    one.consolidate(steps=1)
    store.save(one.memory())
    with pytest.raises(UserError, match=r"was consolidated .* nestling memory rollback .* --to 2"):
        plan_forgetting(store, ["b.txt"])
    merged = MemoryStore(tmp_path / "merged")
    merged.save(replace(store.load(), settings={}))
    with pytest.raises(UserError, match="does not say how it was learned"):
        plan_forgetting(merged, ["a.txt"])


def test_what_was_read_before_a_merge_stays_and_what_came_after_it_goes(tmp_path: Path) -> None:
    """Learning goes on from differences alone; then what they had read cannot be read again as it was."""
    one = read(MemoryStore(tmp_path / "one"), "ab")
    stores = [MemoryStore(tmp_path / name) for name in ("memory", "never")]
    for store, names in zip(stores, ("cd", "d"), strict=True):
        store.save(replace(one, settings={}, tensors={}), "merged")
        read(store, names)
    _, found = forget(stores[0], "c.txt")
    assert_same(untimed(found), untimed(stores[1].load()))
    with pytest.raises(UserError, match="began with an exported or merged memory"):
        plan_forgetting(stores[0], ["a.txt"])
    stores[0].prune(1)
    with pytest.raises(UserError, match="began with an exported or merged memory"):
        plan_forgetting(stores[0], ["a.txt"])


def test_another_model_or_tokenizer_is_refused(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "memory")
    read(store, "ab")
    before = store.index()
    plan = plan_forgetting(store, ["a.txt"])
    other = tiny_llama()
    other.model.embed_tokens.weight.data.add_(1)
    with pytest.raises(ValueError, match="belongs to the base model"):
        learn_again(other, store, plan, lambda _: TEXTS["b"])
    with pytest.raises(UserError, match="157 were read of it: this model's tokenizer"):
        learn_again(tiny_llama(), store, plan, lambda _: replace(TEXTS["b"], ids=TEXTS["b"].ids[:100]))
    with pytest.raises(UserError, match="has 158 tokens, and 157 were read of it"):
        learn_again(tiny_llama(), store, plan, lambda _: replace(TEXTS["b"], ids=text(158)))
    assert store.index() == before
