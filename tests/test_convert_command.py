"""`nestling convert`: what it writes, and what it refuses without writing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nestling.cli import main
from nestling.training.checkpoint import new_directory
from tests.models.pretrained import save_pretrained

LEVELS = ["--levels", "slow=64,fast=16"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a conversion that must fail; returns its one line of error."""
    capsys.readouterr()
    assert main(["convert", *(str(a) for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


def test_a_model_its_tokenizer_and_what_follows(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    assert main(["convert", str(source), str(out), *LEVELS, "--assignment", "split"]) == 0
    said = capsys.readouterr().out
    assert "fast: 9,600 parameters every 16 tokens\nslow: 9,600 parameters every 64 tokens\n" in said
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    original, converted = (AutoModelForCausalLM.from_pretrained(d) for d in (source, out))
    ids = torch.arange(4, 40)[None]
    torch.testing.assert_close(converted(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    before, after = (AutoTokenizer.from_pretrained(d) for d in (source, out))
    chat = [{"role": "user", "content": "Hi"}]
    assert after.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False)
    assert after("abc </s>").input_ids == before("abc </s>").input_ids
    assert main(["generate", str(out), "--prompt", "ab", "--max-new-tokens", "3"]) == 0


def test_names_are_no_markup(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out[/b]"
    assert main(["convert", str(source), str(out), *LEVELS]) == 0
    assert f"saved in {out}" in capsys.readouterr().out


def test_what_was_found_beside_the_configuration_is_told(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert main(["convert", str(source), str(tmp_path / "out"), *LEVELS]) == 0
    assert "note: the model's output projection differs from its embedding" in capsys.readouterr().out
    original, converted = (AutoModelForCausalLM.from_pretrained(d) for d in (source, tmp_path / "out"))
    ids = torch.arange(4, 40)[None]
    torch.testing.assert_close(converted(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)


def test_inspect_shows_the_levels(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(tmp_path / "out"), *LEVELS]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "blocks.*.channel" in text and "1 / 4 steps" in text
    assert main(["inspect", str(tmp_path / "out"), "--levels", "slow=7"]) == 0
    assert "1 / 7 steps" in capsys.readouterr().out


def test_refusals_write_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "no file or directory" in fails(capsys, tmp_path / "nowhere", out)
    assert "unknown --assignment 'top'; choose one of: depth, interleaved, split" in fails(
        capsys, source, out, "--assignment", "top"
    )
    assert "the period of fast is a number of tokens" in fails(capsys, source, out, "--levels", "fast=1.5")
    assert "the levels a and b both have period 8" in fails(capsys, source, out, "--levels", "a=8,b=8")
    levels = ",".join(f"l{i}={i + 1}" for i in range(5))
    assert "cannot be converted: 5 levels cannot share 4 blocks" in fails(capsys, source, out, "--levels", levels)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mlp_bias": True}))
    assert "lacks" in fails(capsys, source, out)
    (source / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert "model cannot be converted: hidden_act 'gelu' is not supported" in fails(capsys, source, out)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_stands_in_out_is_kept(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert main(["convert", str(source), str(out), *LEVELS]) == 0
    (out / "mine.txt").write_text("notes")
    assert "out is not empty; choose a new directory, or replace its model with --overwrite" in fails(
        capsys, source, out
    )
    assert (out / "mine.txt").exists()
    assert "more than a model (mine.txt), which --overwrite would delete" in fails(capsys, source, out, "--overwrite")
    (out / "mine.txt").unlink()
    assert main(["convert", str(source), str(out), "--levels", "one=9", "--overwrite"]) == 0
    assert json.loads((out / "config.json").read_text())["levels"] == {"one": 9}
    (out / "config.json").unlink()
    assert "so --overwrite does not replace it" in fails(capsys, source, out, "--overwrite")
    shutil.rmtree(out)
    out.write_text("a file")
    assert "out is a file" in fails(capsys, source, out, "--overwrite")
    assert "holds the model to convert; give another directory" in fails(capsys, source, source, "--overwrite")
    assert "holds the model to convert" in fails(capsys, source, tmp_path, "--overwrite")
    assert "working directory" in fails(capsys, source, ".")
    assert "choose another directory" in fails(capsys, source, source / "config.json" / "x")
    assert (source / "model.safetensors").exists()


def test_a_failure_while_writing_leaves_the_earlier_model(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(source), str(out), "--levels", "one=9"]) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fail(self: object, place: str) -> None:
        raise RuntimeError("no space for a tokenizer")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
    assert "nothing was written to" in fails(capsys, source, out, "--overwrite", *LEVELS)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_new_directory_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    with new_directory(target) as made:
        (made / "a").write_text("1")
    with pytest.raises(OSError, match="moved away"), new_directory(target) as made:
        (made / "a").write_text("2")
        rename = os.rename

        def refuse(old: Path, new: Path) -> None:
            if old.name == "new":
                raise OSError("moved away")
            rename(old, new)

        monkeypatch.setattr("nestling.training.checkpoint.os.rename", refuse)
    assert (target / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
