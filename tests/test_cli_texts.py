"""The text that commands take and give: where it ends, how it reads, and what an output cannot encode."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from nestling import NestlingForCausalLM, presets
from nestling.cli import main
from nestling.models.conversion import convert
from nestling.training.tokenization import byte_tokenizer
from tests.continual.models import make_memory
from tests.llamas import random_llama
from tests.models.pretrained import tiny_tokenizer
from tests.talkers import answering, sentence
from tests.test_cli import fails

LAMBDA = "\N{GREEK SMALL LETTER LAMDA}"


def save(place: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A model's directory, as users have it."""
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of this library's, and a text with Greek in it and in its name."""
    root = tmp_path_factory.mktemp("texts")
    save(root / "model", NestlingForCausalLM(presets.hope_linear(hidden_size=16, num_layers=1)), byte_tokenizer())
    (root / f"{LAMBDA}.txt").write_text(f"{LAMBDA} and more\n" * 30, encoding="utf-8")
    return root


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("named", [[1, 2], 2, None])
def test_an_answer_ends_where_the_models_own_generate_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], named: Any, converted: bool
) -> None:
    """None: the chat template alone knows how a turn ends."""
    model, tokenizer = answering()
    model.generation_config.eos_token_id = named
    source = save(tmp_path, convert(model, {"fast": 64}) if converted else model, tokenizer)
    chat = ["--chat", "--prompt", "hello", "--temperature", "0", "--max-new-tokens", "8"]
    assert main(["generate", source, *chat]) == 0
    assert capsys.readouterr().out == "good day\n"


def test_prompt_and_continuation_read_as_one_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path, *sentence())
    assert main(["generate", source, "--prompt", "The capital is", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "The capital is Paris of course\n"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "{model}", "--prompt", f"{LAMBDA} and more", "--max-new-tokens", "2"],
        ["read", "{model}", "{text}"],
        ["evaluate", "{model}", "--data", "{text}"],
        ["evaluate", "{model}", "--data", "{text}", "--json"],
        ["inspect", "{model}"],
        ["inspect", "{model}", "--json"],
        ["learn", "{model}", "{text}", "--memory", "{new}", "--context", "64", "--levels", "*.mixer.*=64"],
        ["convert", "{model}", "{new}"],
        ["memory", "show", f"{LAMBDA}"],
        ["--help"],
        ["generate", "--help"],
        ["train", "--help"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_no_command_fails_at_what_an_output_cannot_encode(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], encoding: str
) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    names = {"model": place / "model", "text": place / f"{LAMBDA}.txt", "new": tmp_path / f"new {LAMBDA}"}
    code = main([part.format(**names) for part in command])
    said = {}
    for name, stream in streams.items():
        stream.flush()
        said[name] = stream.buffer.getvalue()  # type: ignore[attr-defined]  # of a BytesIO
    refused = command[0] in ("convert", "memory")  # with the name that cannot be encoded, or that of a model like it
    assert code == (2 if refused else 0), said
    assert said["stderr" if refused else "stdout"]
    if command[0] == "generate" and len(command) > 2:
        assert said["stdout"].startswith(b"? and more")


def test_text_that_no_model_can_go_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No first token for an empty prompt, and more tokens than there are positions."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    size = {"vocab_size": 300, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    source = save(tmp_path, GPT2LMHeadModel(GPT2Config(**size, bos_token_id=None, eos_token_id=None)), tokenizer)
    assert "has no beginning and no end token to begin with; give a --prompt" in fails(capsys, "generate", source)
    long = ["--prompt", "x" * 17]
    assert "the prompt has 17 tokens, and the model has 16 positions" in fails(capsys, "generate", source, *long)
    assert main(["generate", source, "--prompt", "x" * 10, "--max-new-tokens", "50"]) == 0
    assert "stopped after 6 tokens, at the last position that the model has" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "{model}", "--prompt", "say hello"],
        ["learn", "{model}", "{text}", "--memory", "{new}"],
        ["memory", "merge", "{memory}", "{memory}", "{new}", "--model", "{model}", "--text", "{text}"],
    ],
    ids=lambda command: command[0],
)
def test_tokens_beyond_the_embedding_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """Added to the tokenizer by somebody who did not resize the model."""
    tokenizer, model = byte_tokenizer(), random_llama()
    tokenizer.add_tokens(["hello"])
    save(tmp_path / "model", model, tokenizer)
    (tmp_path / "text").write_text("say hello to all " * 20)
    make_memory(model).save(tmp_path / "memory")
    names = {name: tmp_path / name for name in ("model", "text", "new", "memory")}
    error = fails(capsys, *(part.format(**names) for part in command))
    assert "token 259 of the text is beyond the 259 embeddings of" in error
    assert not (tmp_path / "new").exists()
