"""`nestling learn`: what it learns, skips and says; killed at any moment it learns what it would have."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nestling.cli import learning, learning_report, main
from nestling.continual.learn_documents import frozen_loss
from nestling.continual.store.memory import Memory, MemoryFileError
from nestling.continual.store.store import MemoryStore, load_memory
from nestling.continual.store.texts import text_digest
from nestling.models import NestlingForCausalLM, presets
from nestling.training.tokenization import byte_tokenizer
from tests.continual.models import assert_same
from tests.llamas import random_llama
from tests.test_cli import fails

LEVELS = ["--levels", "*.1.mlp.*=64,*.0.mlp.*=128", "--lr", "3e-3", "--context", "64"]
TEXT = "The tide was out, and the boats lay on the sand.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama that reads bytes."""
    path = tmp_path_factory.mktemp("model")
    random_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Two files."""
    for name, line in {"a.txt": TEXT, "b.txt": TEXT.upper()}.items():
        (tmp_path / name).write_text(line * 30)
    return [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def run(*arguments: str | Path) -> int:
    """`nestling learn`."""
    return main(["learn", *map(str, arguments)])


def undated(memory: Memory) -> Memory:
    """Without what depends on the clock."""
    for place, record in enumerate(memory.documents):
        memory.documents[place] = type(record)(**vars(record) | {"started": ""})
    return memory


def test_learn_skip_and_go_on(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "memory"
    assert run(model, texts[0], "--memory", place, *LEVELS, "--note", "first") == 0
    out = capsys.readouterr().out
    assert "1,470 tokens in" in out and "tokens/s" in out and "snapshot 1" in out
    assert "62 tokens wait in the memory for a full step of 64" in out
    memory = load_memory(place)
    record = memory.documents[0]
    assert record.finished and record.tokens == 1470 and record.digest == text_digest(Path(texts[0]).read_text())
    ids = torch.tensor(byte_tokenizer()(Path(texts[0]).read_text()).input_ids)
    base = random_llama()
    before = frozen_loss(base, ids, 64)
    with memory.applied(base):
        after = frozen_loss(base, ids, 64)
    assert f"{before:.4f}" in out and f"{record.loss:.4f}" in out and f"{after:.4f}" in out
    assert after < record.loss < before

    assert run(model, texts[0], "--memory", place) == 0
    assert capsys.readouterr().out == f"{texts[0]}: learned already, skipped\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"From a pipe, and not from a file. " * 5)))
    assert run(model, *texts, "-", "--memory", place, "--quick") == 0
    out = capsys.readouterr().out
    assert "skipped" in out and "after" not in out and "standard input" in out
    snapshots = MemoryStore(place).index().snapshots
    assert [s.note for s in snapshots] == ["first", "learned b.txt, standard input"]
    assert [d.finished for d in load_memory(place).documents] == [True] * 3


def test_the_same_in_one_go_and_in_two(model: Path, texts: list[str], tmp_path: Path) -> None:
    assert run(model, *texts, "--memory", tmp_path / "one", *LEVELS, "--quick", "--save-tokens", "256") == 0
    assert run(model, texts[0], "--memory", tmp_path / "two", *LEVELS) == 0
    assert run(model, *texts, "--memory", tmp_path / "two") == 0
    one, two = undated(load_memory(tmp_path / "one")), undated(load_memory(tmp_path / "two"))
    assert_same(one, two)


@pytest.mark.parametrize("steps", [1, 3, 6, 8])
def test_interrupted_it_goes_on(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:  # fmt: skip
    """Ctrl-C after each of these steps; the sixth is the last of the first document, and leaves 62 of a chunk of 64."""
    assert run(model, *texts, "--memory", tmp_path / "whole", *LEVELS, "--quick") == 0
    real, seen = learning.Outcome.add, 0

    def add(self: learning.Outcome, progress: learning.Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == steps:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, progress)

    monkeypatch.setattr(learning.Outcome, "add", add)
    capsys.readouterr()
    handler = signal.getsignal(signal.SIGINT)
    assert run(model, *texts, "--memory", tmp_path / "cut", *LEVELS, "--quick") == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert "the same command goes on from here" in capsys.readouterr().err
    tokens = load_memory(tmp_path / "cut").tokens
    assert tokens == {1: 256, 3: 768, 6: 1470, 8: 1470 + (2 + 3 * 64) + 256}[steps]
    assert run(model, *texts, "--memory", tmp_path / "cut", "--quick") == 0
    assert_same(undated(load_memory(tmp_path / "cut")), undated(load_memory(tmp_path / "whole")))
    assert len(MemoryStore(tmp_path / "cut").index().snapshots) == 1


def test_another_document_may_come_between(
    model: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A document left unfinished is taken up again at its place: every token once."""
    place, real = tmp_path / "memory", learning.Outcome.add

    def add(self: learning.Outcome, progress: learning.Progress) -> None:
        real(self, progress)
        if self.tokens == 512:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(learning.Outcome, "add", add)
        assert run(model, texts[0], "--memory", place, *LEVELS, "--quick") == 130
    assert run(model, texts[1], texts[0], "--memory", place, "--quick") == 0
    assert "going on after 512 of 1,470 tokens" in capsys.readouterr().out
    assert [(d.tokens, d.finished) for d in load_memory(place).documents] == [(512, False), (1470, True), (958, True)]
    assert run(model, *texts, "--memory", place) == 0
    assert load_memory(place).tokens == 2940


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """SIGKILL as soon as something holds."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not ready():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors


def test_killed_it_learns_what_it_would_have(model: Path, texts: list[str], tmp_path: Path) -> None:
    """A real SIGKILL, in the second document; the weights, optimizer and counters at the end are equal bit for bit."""
    Path(texts[1]).write_text(TEXT.upper() * 120)
    arguments = [str(model), *texts, *LEVELS, "--quick", "--save-tokens", "256"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    command = [sys.executable, "-m", "nestling", "learn", *arguments, "--memory", str(cut)]
    store = MemoryStore(cut)

    def far_enough() -> bool:
        try:
            return store.head().tokens >= 2500
        except MemoryFileError:
            return False

    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    kill_when(process, far_enough)
    left = store.load()
    assert store.head().autosave and 2500 <= left.tokens < 7350, "it was too quick to be killed"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run(*arguments, "--memory", cut) == 0
        assert run(*arguments, "--memory", whole) == 0
    finally:
        torch.set_num_threads(threads)
    assert_same(undated(store.load()), undated(load_memory(whole)))
    assert [d.tokens for d in store.load().documents] == [1470, 5880]


def test_a_memory_inside_the_directory_that_is_read_is_no_text(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [model, Path(texts[0]).parent, "--memory", tmp_path / "memory", "--quick"]
    assert run(*arguments, *LEVELS) == 0
    capsys.readouterr()
    assert run(*arguments) == 0
    assert capsys.readouterr().out == "".join(f"{text}: learned already, skipped\n" for text in texts)
    (tmp_path / "memory" / "memory.json").unlink()
    (tmp_path / "memory" / "snapshot-0001.safetensors").rename(tmp_path / "memory" / "snapshot-0001.found")
    assert run(*arguments, *LEVELS) == 0  # a directory without an index is left out where it is the memory's own


def test_names_of_files_are_harmless(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, place = tmp_path / "a\x1b[2J[b]\udce9.txt", tmp_path / "mem\x1b[2J"
    file.write_text(TEXT * 3)
    for _ in range(2):
        assert run(model, file, "--memory", place, *LEVELS) == 0
        text = capsys.readouterr().out
        text = re.sub(r"[ │]*\n[ │]*", "", text)  # a long path is folded in the table
        assert "\x1b" not in text and "a�[2J[b]�.txt" in text
    assert "a�[2J[b]�.txt" in fails(capsys, "learn", model, f"{file}.none", "--memory", place)


def test_help_shows_patterns_as_they_are_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asterisks of a help text would be taken for emphasis."""
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["learn", "--help"]) == 0
    assert "*.mlp.*=256" in capsys.readouterr().out


def test_what_is_replayed_is_taught_by_the_running_mean(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*LEVELS, "--teacher", "640", "--replay", "8"]
    assert run(model, texts[0], "--memory", tmp_path / "two", *options) == 0
    printed = capsys.readouterr().out
    memory = load_memory(tmp_path / "two")
    made = memory.settings["learner"]["options"]
    assert (made["average"], made["replay"]["teacher"], made["replay"]["weight"]) == (640, "average", 1.0)
    base = random_llama()
    ids = torch.tensor(byte_tokenizer()(Path(texts[0]).read_text())["input_ids"])
    with memory.applied(base):
        after = frozen_loss(base, ids, 64)
    assert f"{after:.4f}" in printed
    assert run(model, texts[1], "--memory", tmp_path / "two", "--quick") == 0
    assert run(model, *texts, "--memory", tmp_path / "one", *options, "--quick") == 0
    assert_same(undated(load_memory(tmp_path / "one")), undated(load_memory(tmp_path / "two")))
    small = fails(
        capsys, "learn", model, texts[0], "--memory", tmp_path / "no", *LEVELS, "--teacher", "10", "--replay", "1"
    )
    assert "average is 64 tokens or more" in small and not (tmp_path / "no").exists()
    alone = fails(capsys, "learn", model, texts[0], "--memory", tmp_path / "no", *LEVELS, "--teacher", "640")
    assert "--teacher teaches what --replay keeps" in alone
    again = fails(capsys, "learn", model, texts[0], "--memory", tmp_path / "two", "--teacher", "128")
    assert "--teacher 128: this memory was begun with 640" in again


def test_what_the_model_knew_is_rehearsed(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*LEVELS, "--rehearse", "4", "--quick"]
    assert run(model, texts[0], "--memory", tmp_path / "two", *options) == 0
    printed = capsys.readouterr()
    assert "writes 4 pieces of 32 tokens" in printed.out and "128 tokens written in" in printed.out
    assert "tokens written" not in printed.err
    memory = load_memory(tmp_path / "two")
    assert memory.settings["learner"]["options"]["rehearsal"] == {"pieces": 4, "length": None, "weight": 0.3}
    assert run(model, texts[1], "--memory", tmp_path / "two", "--quick") == 0
    assert "writes" not in capsys.readouterr().out
    assert run(model, *texts, "--memory", tmp_path / "one", *options) == 0
    assert_same(undated(load_memory(tmp_path / "one")), undated(load_memory(tmp_path / "two")))
    again = fails(capsys, "learn", model, texts[0], "--memory", tmp_path / "two", "--rehearse", "5")
    assert "--rehearse 5: this memory was begun with 4" in again


def test_writing_may_be_watched_and_interrupted(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [model, texts[0], "--memory", tmp_path / "memory", *LEVELS, "--rehearse", "4", "--quick"]
    real = learning_report.ProgressLines.writing

    def writing(self: learning_report.ProgressLines, done: int, total: int) -> None:
        real(self, done, total)
        if done == 40:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(learning_report, "LINE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(learning_report.ProgressLines, "writing", writing)
        assert run(*arguments) == 130
    printed = capsys.readouterr()
    assert "nats" not in printed.out
    lines = printed.err.splitlines()
    assert lines[:9] == [f"{done} of 128 tokens written" for done in range(8, 44, 4)]
    assert "stopping after this step" in lines[10] and "the same command begins again" in lines[-1]
    assert not (tmp_path / "memory").exists()
    assert run(*arguments) == 0
    written = [line for line in capsys.readouterr().err.splitlines() if "written" in line]
    assert written == [f"{done} of 128 tokens written" for done in range(8, 132, 4)]


def test_progress_without_a_terminal(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line after so many seconds, on standard error."""
    arguments = [model, *texts, texts[0], "--quick", *LEVELS]
    monkeypatch.setattr(learning_report, "LINE_SECONDS", 0.0)
    assert run(*arguments, "--memory", tmp_path / "often") == 0
    lines = capsys.readouterr().err.splitlines()
    pattern = r"([\d,]+) of 2,940 tokens, [\d,]+\.\d tokens/s, mean loss \d\.\d{4}"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert all(found) and len(found) == 12
    assert [m[1] for m in found if m][:2] == ["256", "512"] and lines[-1].startswith("2,940 of")
    monkeypatch.setattr(learning_report, "LINE_SECONDS", 3600.0)
    assert run(*arguments, "--memory", tmp_path / "seldom") == 0
    assert capsys.readouterr().err == ""


def test_one_level_of_a_converted_model_and_its_losses_elsewhere(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All MLPs of a converted model as one level; `memory export` measures with the memory's own context."""
    converted, place = tmp_path / "converted", tmp_path / "memory"
    assert main(["convert", str(model), str(converted), "--levels", "fast=64,slow=128"]) == 0
    arguments = [converted, texts[0], "--memory", place, *LEVELS[2:]]
    assert "fits no parameter; the model has the levels fast, slow and the parameters" in fails(
        capsys, "learn", *arguments, "--levels", "*.mlp.*=64"
    )
    capsys.readouterr()
    assert run(*arguments, "--levels", "*.channel.*=64", "--replay", "4", "--teacher", "640", "--rehearse", "2") == 0
    printed = capsys.readouterr().out
    assert load_memory(place).periods == {"*.channel.*": 64}
    measured = ["--model", str(converted), "--text", texts[0]]
    assert main(["memory", "export", str(place), str(tmp_path / "x.safetensors"), *measured]) == 0
    exported = capsys.readouterr().out
    row = re.search(r"([\d.]+) +│ +([\d.]+) +│ +([\d.]+) +│$", printed, re.MULTILINE)
    assert row is not None and row[1] in exported and row[3] in exported


def test_the_mlps_of_a_model_without_levels(texts: list[str], tmp_path: Path) -> None:
    """By default all MLPs every 256 tokens, whatever the model calls them."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 259}
    NestlingForCausalLM(presets.transformer(**sizes)).save_pretrained(tmp_path / "own")
    byte_tokenizer().save_pretrained(tmp_path / "own")
    assert run(tmp_path / "own", texts[0], "--memory", tmp_path / "memory", "--quick") == 0
    assert load_memory(tmp_path / "memory").periods == {"*.channel.*": 256}


def test_a_merge_of_a_rank_with_full_differences_goes_on(model: Path, texts: list[str], tmp_path: Path) -> None:
    for name, more in (("small", ["--rank", "4"]), ("full", [])):
        assert run(model, texts[0], "--memory", tmp_path / name, *LEVELS, *more, "--quick") == 0
    for a, b in (("small", "full"), ("full", "small")):
        out = tmp_path / f"{a} and {b}"
        assert main(["memory", "merge", str(tmp_path / a), str(tmp_path / b), str(out)]) == 0
        assert run(model, texts[1], "--memory", out, "--quick") == 0


def test_what_a_user_can_put_right(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "memory"
    common = ["learn", model, texts[0], "--memory", place]
    assert "no file or directory" in fails(capsys, "learn", model, tmp_path / "no.txt", "--memory", place)
    assert "no file or directory" in fails(capsys, "learn", tmp_path / "none" / "such", texts[0], "--memory", place)
    assert "is no NAME=PERIOD" in fails(capsys, *common, "--levels", "fast")
    assert "fits no parameter" in fails(capsys, *common, "--levels", "fast=64")
    assert "no multiple of the fastest" in fails(capsys, *common, "--levels", "*.0.mlp.*=64,*.1.mlp.*=100")
    assert "optimizer" in fails(capsys, *common, "--optimizer", "nothing")
    assert "--lr" in fails(capsys, *common, "--lr", "-1")
    assert "--lr" in fails(capsys, *common, "--lr", "nan")
    assert "rank" in fails(capsys, *common, "--rank", "1000")
    other = tmp_path / "other"
    random_llama(seed=1).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    assert not place.exists()
    assert "is a file and no memory" in fails(capsys, "learn", model, texts[0], "--memory", texts[1])
    assert run(*common[1:], *LEVELS, "--quick") == 0
    more = ["learn", model, texts[1], "--memory", place]
    error = fails(capsys, *more, "--lr", "1e-5")
    assert "--lr 1e-05: this memory was begun with 0.003" in error
    assert "--levels" in fails(capsys, *more, "--levels", "*.mlp.*=64")
    # The same where there is nothing to learn.
    assert "--lr 1e-05: this memory was begun with 0.003" in fails(capsys, *common, "--lr", "1e-5")
    assert "no file or directory" in fails(capsys, "learn", tmp_path / "none" / "such", texts[0], "--memory", place)
    assert "belongs to the base model" in fails(capsys, "learn", other, texts[0], "--memory", place)
    assert "belongs to the base model" in fails(capsys, "learn", other, texts[1], "--memory", place)
    with MemoryStore(place).lock():
        code = "import sys; from nestling.cli import main; sys.exit(main(sys.argv[1:]))"
        # The lock is another process's: this one may take it twice.
        process = subprocess.run([sys.executable, "-c", code, *map(str, more)], capture_output=True, text=True)
    assert process.returncode == 2 and "being written by another process" in process.stderr
    assert len(MemoryStore(place).index().snapshots) == 1
