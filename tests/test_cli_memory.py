"""`nestling memory ...` and `nestling generate --memory`."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nestling.cli import main
from nestling.continual.learn_documents import frozen_loss
from nestling.continual.store.memory import LowRank, Memory
from nestling.continual.store.records import dense
from nestling.continual.store.store import MemoryStore, load_memory
from nestling.models.conversion import convert
from nestling.printing import printable
from nestling.training.tokenization import byte_tokenizer
from tests.continual.models import assert_same, make_memory
from tests.llamas import random_llama
from tests.test_cli import fails


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model, two memories of it (`a` has two snapshots) and a text."""
    model = random_llama()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("It was the best of times.\n" * 10)
    a = MemoryStore(tmp_path / "a")
    a.save(make_memory(model, size=0.03), "one")
    a.save(make_memory(model, seed=1, size=0.2), "two [brackets]")
    MemoryStore(tmp_path / "b").save(make_memory(model, seed=2, size=0.05))
    return tmp_path


def out(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a command that works prints."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def losses(place: Path, *memories: Memory | None) -> list[str]:
    """Of the text, as printed."""
    model, found = random_llama(), []
    ids = torch.tensor(byte_tokenizer()((place / "text.txt").read_text()).input_ids)
    for memory in memories:
        if memory is not None:
            memory.apply(model)
        found.append(f"{frozen_loss(model, ids):.4f}")
        if memory is not None:
            memory.remove(model)
    return found


def test_show_names_the_snapshot_that_it_shows(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner saves between the reading of the snapshot and that of the index, in place of an autosave."""
    store = MemoryStore(tmp_path / "busy")
    real, a, b = MemoryStore.read, load_memory(place / "a"), load_memory(place / "b")
    store.save(a, "first")
    store.save(a, "not finished", autosave=True)

    def read_and_save(self: MemoryStore, number: int | None = None):
        found = real(self, number)
        MemoryStore(store.path).save(b, "later")
        return found

    monkeypatch.setattr(MemoryStore, "read", read_and_save)
    shown = json.loads(out(capsys, "memory", "show", store.path, "--json"))
    assert shown["head"] == 2 and [s["number"] for s in shown["snapshots"]] == [1, 2, 3]
    assert shown["snapshots"][1]["note"] == "not finished"
    assert len(shown["documents"]) == len(a.documents)


def test_show(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "memory", "show", place / "a")
    for part in ("127 tokens", "fast", "64", "a.txt", "2.5000", "in part", "2 (head)", "two [brackets]"):
        assert part in text
    shown = json.loads(out(capsys, "memory", "show", place / "a", "--json"))
    assert shown["head"] == 2 and [s["number"] for s in shown["snapshots"]] == [1, 2]
    assert [level["level"] for level in shown["levels"]] == ["fast", "slow"] and set(shown["layers"]) == {"0", "1"}
    assert shown["documents"][1]["loss"] is None
    load_memory(place / "a").save(place / "file")
    assert json.loads(out(capsys, "memory", "show", place / "file", "--json")) == shown | {
        "head": None,
        "snapshots": [],
    }
    assert "no memory file at" in fails(capsys, "memory", "show", place / "none")
    assert "without memory.json" in fails(capsys, "memory", "show", place / "model")


ESCAPES = "\x1b[2J\x9b31m\x07[/b]\nsecond line\udce9"


def test_names_from_elsewhere_are_harmless(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Terminal escapes, markup, line ends and halves of characters in whatever a stranger's memory names."""
    memory = make_memory(random_llama())
    memory.documents = [replace(memory.documents[0], name=f"doc {ESCAPES}", digest="cc", started=ESCAPES)]
    memory.periods = {f"{name} {ESCAPES}": period for name, period in memory.periods.items()}
    memory.parameters = {f"{name} {ESCAPES}": names for name, names in memory.parameters.items()}
    store = MemoryStore(place / "hostile")
    store.save(load_memory(place / "a"), f"note {ESCAPES}")
    store.save(memory, f"note {ESCAPES}")
    for arguments in (["show", store.path], ["diff", store.path, place / "a"], ["rollback", store.path, "--to", "2"]):
        for more in [[], ["--json"]] if arguments[0] != "rollback" else [[]]:
            text = out(capsys, "memory", *arguments, *more)
            assert not any(character in text for character in "\x1b\x9b\x07\udce9") and "second line" in text
    assert "\x1b" not in out(capsys, "memory", "fork", store.path, place / f"new {ESCAPES}")
    assert "\x1b" not in fails(capsys, "memory", "fork", store.path, place / f"new {ESCAPES}")
    assert "[/b] second line" in out(capsys, "memory", "rollback", store.path)


def test_long_names_are_cut_and_show_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = make_memory(random_llama())
    memory.documents = [replace(memory.documents[0], name="d" * 3_000_000 + ".txt")] * 3
    name = next(iter(memory.differences))
    memory.differences[f"layers.{'9' * 5000}.weight"] = memory.differences[name]
    MemoryStore(place / "long").save(memory, "n" * 1_000_000)
    began = time.monotonic()
    text = out(capsys, "memory", "show", place / "long")
    assert time.monotonic() - began < 5 and len(text) < 10_000
    assert "ddd…ddd" in text and ".txt" in text and "nnn…nnn" in text
    assert "-1" in json.loads(out(capsys, "memory", "show", place / "long", "--json"))["layers"]


def test_diff(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "memory", "diff", place / "a", place / "b")
    assert "cosine" in text and "b.txt" in text
    shown = json.loads(out(capsys, "memory", "diff", place / "a", place / "a", "--json"))
    assert shown["levels"][0]["cosine"] == pytest.approx(1) and shown["only_a"] == []


def test_fork_rollback_prune(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fork of" in out(capsys, "memory", "fork", place / "a", place / "c", "--at", "1")
    assert_same(load_memory(place / "c"), load_memory(place / "a", 1))
    assert "now at snapshot 1" in out(capsys, "memory", "rollback", place / "a")
    assert "now at snapshot 2" in out(capsys, "memory", "rollback", place / "a", "--to", "2")
    assert "deleted snapshots 1 (" in out(capsys, "memory", "prune", place / "a", "--keep", "1")
    assert "is the first" in fails(capsys, "memory", "rollback", place / "a")
    assert "already something" in fails(capsys, "memory", "fork", place / "a", place / "c")


def test_merge(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["memory", "merge", place / "a", place / "b", place / "c", "--weight", "1,1", "--level", "fast=0.7,0.3"]
    text = out(capsys, *arguments, "--model", place / "model", "--text", place / "text.txt")
    a, b, c = (load_memory(place / name) for name in "abc")
    for loss in losses(place, None, a, b, c):
        assert loss in text
    for level, weights in {"fast": (0.7, 0.3), "slow": (1, 1)}.items():
        name = c.parameters[level][1]
        wanted = weights[0] * dense(a.differences[name]) + weights[1] * dense(b.differences[name])
        torch.testing.assert_close(dense(c.differences[name]), wanted)
    assert "already something" in fails(capsys, *arguments)
    new = [*arguments[:4], place / "d"]
    assert "write two numbers" in fails(capsys, *new, "--weight", "1")
    assert "write NAME=A,B" in fails(capsys, *new, "--level", "1,2")
    assert "no level 'mid'" in fails(capsys, *new, "--level", "mid=1,2")
    assert "--model and --text go together" in fails(capsys, *new, "--model", place / "model")
    MemoryStore(place / "z").save(make_memory(random_llama(seed=5)))
    assert "different base models" in fails(capsys, "memory", "merge", place / "a", place / "z", place / "d")
    assert "beyond float32" in fails(capsys, *new, "--weight", "1e39,1e39")
    assert not (place / "d").exists()


def test_export(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["memory", "export", place / "a", place / "x.safetensors", "--rank", "4", "--dtype", "float16"]
    text = out(capsys, *arguments, "--model", place / "model", "--text", place / "text.txt")
    exported = Memory.load(place / "x.safetensors")
    assert all(isinstance(d, LowRank) for d in exported.differences.values()) and not exported.tensors
    for part in ("% of the difference's energy", *losses(place, None, load_memory(place / "a"), exported)):
        assert part in text
    assert f"{(place / 'x.safetensors').stat().st_size:,} bytes" in text
    assert "with --overwrite" in fails(capsys, *arguments[:4])
    assert_same(Memory.load(place / "x.safetensors"), exported)
    out(capsys, *arguments[:4], "--overwrite")
    assert not all(isinstance(d, LowRank) for d in Memory.load(place / "x.safetensors").differences.values())
    assert "exists and is no memory" in fails(capsys, *arguments[:3], place / "text.txt", "--overwrite")
    assert "choose one of" in fails(capsys, *arguments[:4], "--dtype", "int8")
    assert "cannot be a file" in fails(capsys, *arguments[:3], place / "none" / "x")
    assert "among the snapshots" in fails(capsys, *arguments[:3], place / "a" / "x")
    assert "belongs to another model" in fails(
        capsys, "generate", converted(place), "--prompt", "It", "--memory", place / "x.safetensors"
    )


def test_a_refused_export_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["memory", "export", place / "a", place / "x.safetensors"]
    text = ["--text", place / "text.txt"]
    for measuring, error in (
        (["--model", converted(place), *text], "belongs to another model"),
        (["--model", place / "none" / "such", *text], "no file or directory"),
        (["--model", place / "model", "--text", place / "none.txt"], "no file or directory"),
    ):
        assert error in fails(capsys, *arguments, *measuring)
        assert not (place / "x.safetensors").exists()


def converted(place: Path) -> Path:
    """The model with two levels."""
    path = place / "converted"
    convert(random_llama(), {"fast": 16, "slow": 64}).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_generate_with_a_learned_memory(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A greedy continuation is that of the model with the memory applied, from the directory and from a file."""
    load_memory(place / "a").save(place / "file")
    prompt = ["--prompt", "It was", "--max-new-tokens", "12", "--temperature", "0"]
    model, tokenizer = random_llama(), byte_tokenizer()
    ids = tokenizer("It was", return_tensors="pt").input_ids

    def greedy() -> str:
        quiet = [[0], [1]]
        found = model.generate(ids, max_new_tokens=12, do_sample=False, bad_words_ids=quiet)
        return str(tokenizer.decode(found[0], skip_special_tokens=True))

    plain = greedy()
    with load_memory(place / "a").applied(model):
        learned = greedy()
    assert plain != learned
    for memory, wanted in (([], plain), (["--memory", place / "a"], learned), (["--memory", place / "file"], learned)):
        assert out(capsys, "generate", place / "model", *prompt, *memory) == printable(wanted) + "\n"
    two = ["--memory", place / "a", "--memory", place / "b"]
    assert "two memories" in fails(capsys, "generate", place / "model", *prompt, *two)
    assert "belongs to another model" in fails(capsys, "generate", converted(place), *prompt, "--memory", place / "a")
    assert "keeps nothing that it reads" in fails(
        capsys, "generate", place / "model", *prompt, "--save-state", place / "s"
    )
    assert "has no chat template" in fails(capsys, "generate", place / "model", *prompt, "--chat")


def test_a_learned_memory_and_a_state_together(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A state belongs to the weights it was read with: it goes with the learned memory, and not without it."""
    model = converted(place)
    learn = ["learn", model, place / "text.txt", "--memory", place / "m", "--lr", "0.01", "--quick"]
    out(capsys, *learn)
    learned, state = ["--memory", place / "m"], ["--state", place / "state"]
    more = ["--prompt", "It was", "--max-new-tokens", "5", "--temperature", "0"]
    out(capsys, "generate", model, *more, *learned, "--save-state", place / "state")
    first = out(capsys, "generate", model, *more, *learned, *state)
    assert out(capsys, "generate", model, *more, *state, *learned) == first
    assert "saved by another model" in fails(capsys, "generate", model, *more, *state)
    assert "a LlamaForCausalLM takes no state" in fails(capsys, "generate", place / "model", *more, *state)
    assert "is a memory of nestling learn and no state" in fails(
        capsys, "generate", model, *more, "--state", place / "m"
    )
    (place / "damaged").write_bytes((place / "state").read_bytes()[:-9])
    assert "damaged" in fails(capsys, "generate", model, *more, "--state", place / "damaged")


def test_the_names_that_flags_had_in_0_1(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--memory` took states, and `--save-memory` wrote them; each with a hint now."""
    model, text = converted(place), str(place / "text.txt")
    out(capsys, "read", model, text, "--save-state", place / "new")
    capsys.readouterr()
    for old in (
        ["read", model, text, "--save-memory", place / "old"],
        ["read", model, text, "--memory", place / "new"],
        ["generate", model, "--prompt", "a", "--memory", place / "new", "--save-memory", place / "later"],
        ["evaluate", model, "--data", text, "--memory", place / "new"],
    ):
        assert main([str(a) for a in old]) == 0
        error = capsys.readouterr().err
        assert ("hint: --save-memory is called --save-state now" in error) is ("--save-memory" in old)
        assert ("is a state: give it with --state" in error) is ("--memory" in old)
    old, new = load_file(place / "old"), load_file(place / "new")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in new)
    assert "two states" in fails_last(capsys, "read", model, text, "--state", place / "new", "--memory", place / "old")
    both = ["--save-state", place / "x", "--save-memory", place / "y"]
    assert "are one flag; give the first" in fails_last(capsys, "read", model, text, *both)


def fails_last(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """As `fails`, after hints."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_chat(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m.content }}\n{% endfor %}A: "
    tokenizer.save_pretrained(place / "model")
    more = ["--max-new-tokens", "6", "--temperature", "0"]
    answer = out(capsys, "generate", place / "model", "--prompt", "Who?", "--chat", *more)
    whole = out(capsys, "generate", place / "model", "--prompt", "Q: Who?\nA: ", *more)
    assert whole == "Q: Who?\nA: " + answer
    assert "--chat needs a --prompt" in fails(capsys, "generate", place / "model", "--chat")
