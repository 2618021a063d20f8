"""The command line: what each command does, and one line with exit code 2 for everything a user can put right."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import nestling
from nestling.cli import main
from nestling.cli.app import spread_lists
from nestling.errors import UserError
from nestling.training import TrainConfig, train
from nestling.training.config import parse_overrides

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom.\n" * 20
SMALL = ["--set", "hidden_size=16", "num_layers=1", "num_heads=1", "--steps", "3", "--sequence-length", "32"]
SMALL += ["--batch-size", "4", "--eval-tokens", "200", "--sample-tokens", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two trained models (`run`, `other`), a text, and a state of the first model."""
    root = tmp_path_factory.mktemp("cli")
    (root / "text.txt").write_text(TEXT)
    for seed, name in enumerate(["run", "other"]):
        config = TrainConfig(
            out=str(root / name),
            overrides={"hidden_size": 16, "num_layers": 1, "num_heads": 1},
            sequence_length=32,
            batch_size=4,
            steps=6,
            seed=seed,
            eval_tokens=200,
            sample_tokens=0,
            tensorboard=False,
            device="cpu",
        )
        train(config)
    assert main(["read", str(root / "run"), str(root / "text.txt"), "--save-state", str(root / "state")]) == 0
    return root


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must fail; returns its one line of error."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


def test_help_reads_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nestling", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("nestling", run_name="__main__")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for command in ("train", "generate", "evaluate", "read"):
        assert f" {command} " in text
    assert "Start with: nestling train" in text
    assert main([]) == 2
    assert "Usage: nestling" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nestling {nestling.__version__}\n"


def test_every_option_of_train_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--preset", "--data", "--tokenizer", "--carry-state", "--resume", "--lr", "--streaming"):
        assert option in text


def test_train_and_resume_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT)
    out = str(tmp_path / "run")
    data = ["--data", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert main(["train", *SMALL, "--out", out, "--preset", "transformer", *data]) == 0
    text = capsys.readouterr().out
    for part in ("last 10% of each corpus", "transformer, size tiny", "step 3/3", "tokens/s", "bits per byte", "saved"):
        assert part in text
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert main(["train", "--out", out, "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert "other settings (seed: 0 -> 5)" in fails(capsys, "train", "--out", out, "--resume", "--seed", "5")
    assert "already holds a run" in fails(capsys, "train", "--out", out)


def test_generate_goes_on_from_a_state(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, first, second = str(place / "run"), str(place / "m1"), str(place / "m2")
    quiet = ["--temperature", "0"]
    assert main(["generate", run, "--prompt", "It was", "--max-new-tokens", "8", "--save-state", first, *quiet]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("It was") and "state after 15 tokens" in captured.err  # bos, 6 bytes, 8 written
    assert main(["generate", run, "--prompt", "the", "--max-new-tokens", "0", "--state", first]) == 0
    assert capsys.readouterr().out == "the\n"
    more = ["--prompt", "x", "--max-new-tokens", "4", "--state", first, "--save-state", second]
    assert main(["generate", run, *more, *quiet]) == 0
    assert "state after 20 tokens" in capsys.readouterr().err


def test_blocks_run_as_often_as_is_said(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From no state, and then from the state as it was made."""
    run, text = str(place / "run"), str(place / "text.txt")
    once, twice = str(tmp_path / "once"), str(tmp_path / "twice")
    quiet = ["--prompt", "It was", "--max-new-tokens", "4", "--temperature", "0"]
    assert main(["generate", run, *quiet, "--save-state", once]) == 0
    assert main(["generate", run, *quiet, "--save-state", twice, "--loops", "2"]) == 0
    assert Path(twice).stat().st_size > 1.5 * Path(once).stat().st_size
    assert main(["generate", run, *quiet, "--state", twice]) == 0
    assert main(["generate", run, *quiet, "--state", twice, "--loops", "2"]) == 0
    wrong = fails(capsys, "generate", run, *quiet, "--state", twice, "--loops", "3")
    assert "--loops 3: the state was made with 2, and goes on so; leave --loops out" in wrong
    capsys.readouterr()
    losses = []
    for loops in ("1", "2"):
        assert main(["evaluate", run, "--data", text, "--json", "--loops", loops]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
        assert main(["read", run, text, "--loops", loops]) == 0
        assert "tokens read" in capsys.readouterr().out
    assert losses[0] != losses[1]


def test_sampling_repeats_with_its_seed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: str) -> str:
        assert main(["generate", str(place / "run"), "--max-new-tokens", "30", "--seed", seed]) == 0
        return capsys.readouterr().out

    assert sample("1") == sample("1") != sample("2")


def test_evaluate_modes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(*more: str | Path) -> dict[str, float]:
        capsys.readouterr()
        arguments = ["evaluate", place / "run", "--data", place / "text.txt", "--json", *more]
        assert main([str(a) for a in arguments]) == 0
        return json.loads(capsys.readouterr().out)

    default, reset, carried = measure(), measure("--reset", "32"), measure("--carry")
    assert default == reset
    assert default["state"] == "reset every 32 tokens"
    assert carried["tokens"] == default["tokens"] == carried["bytes"] == len(TEXT)
    assert carried["loss"] != default["loss"]
    assert measure("--reset", str(10**6))["loss"] == pytest.approx(carried["loss"], abs=1e-3)
    assert carried["perplexity"] == pytest.approx(math.exp(carried["loss"]))
    assert carried["bits_per_byte"] == pytest.approx(carried["loss"] / math.log(2))
    from_state = measure("--state", place / "state")
    assert from_state["tokens"] == len(TEXT) - 1 and from_state["loss"] != default["loss"]
    assert main(["evaluate", str(place / "run"), "--data", str(place / "text.txt")]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_inspect(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(place / "run")
    assert main(["inspect", run, "--levels", "cms.1=8", "--plot", str(tmp_path / "levels.svg")]) == 0
    output = capsys.readouterr().out
    assert "1 / 8 steps" in output and "AdamW, lr 0.003, decay 0 to 0.1" in output and "picture written" in output
    assert (tmp_path / "levels.svg").read_text().startswith("<?xml")
    assert main(["inspect", run, "--optimizer", "sgd", "--json"]) == 0
    rules = [c["rule"] for level in json.loads(capsys.readouterr().out)["levels"] for c in level["components"]]
    assert any(rule.startswith("SGD, lr 0.003") for rule in rules)
    for arguments, tokens in (([], 32), (["--tokens-per-step", "5"], 5)):
        assert main(["inspect", run, "--json", *arguments]) == 0
        values = json.loads(capsys.readouterr().out)
        assert values["levels"][0]["per_step"] == tokens  # rows of 32 tokens, and memories that start anew with them
        assert all("rows start anew after 32: training never reads an update" in note for note in values["notes"])
        assert values["notes"]
    assert main(["inspect", run, "--optimizer", "none"]) == 0
    assert "no optimizer" in capsys.readouterr().out
    assert "unknown optimizer 'adan'; choose one of: adamw, " in fails(capsys, "inspect", run, "--optimizer", "adan")
    assert "cms.9 fits no parameter" in fails(capsys, "inspect", run, "--levels", "cms.9=2")
    assert "must end in .svg" in fails(capsys, "inspect", run, "--plot", tmp_path / "levels.bmp")
    assert "no directory" in fails(capsys, "inspect", run, "--plot", tmp_path / "no" / "levels.svg")
    assert "no meaning with" in fails(capsys, "inspect", run, "--optimizer", "none", "--levels", "cms.1=2")


def test_reading_in_two_parts_equals_reading_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(place / "run")
    (place / "first.txt").write_text(TEXT[:700])
    (place / "rest.txt").write_text(TEXT[700:])
    assert main(["read", run, str(place / "first.txt"), "--save-state", str(place / "half")]) == 0
    more = ["--state", str(place / "half"), "--save-state", str(place / "joined"), "--bins", "3"]
    assert main(["read", run, str(place / "rest.txt"), *more]) == 0
    output = capsys.readouterr().out
    assert f"state after {len(TEXT) + 1:,} tokens" in output and "mean loss" in output
    once, joined = load_file(place / "state"), load_file(place / "joined")
    for name, tensor in once.items():
        assert joined[name].shape == tensor.shape
        # The memories amplify the rounding of float32, to 1e-3 here; a token left out moves them by 0.4.
        assert (joined[name].float() - tensor.float()).abs().max() < 1e-2, name


def test_errors_of_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "new")]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary").write_bytes(b"text \xff")
    (tmp_path / "short.txt").write_text("short text")
    cases = [
        (["--data", str(tmp_path / "none.txt")], "no file or directory at"),
        (["--data", str(tmp_path / "empty.txt")], "holds no text"),
        (["--data", str(tmp_path / "binary")], "is not UTF-8 (byte 0xff at offset 5)"),
        (["--data", str(tmp_path / "short.txt")], "shorter than one sequence"),
        (["--preset", "hopp"], "unknown preset 'hopp'; choose one of: hope, "),
        (["--size", "7b"], "unknown size '7b'; choose one of: tiny, 340m, 760m, 1.3b"),
        (["--set", "width=3"], "has no setting width"),
        (["--set", "width"], "write NAME=VALUE"),
        (["--steps", "0"], "--steps"),
        (["--lr", "inf", "--optimizer", "m3"], "finite"),
        (["--level-rate-exponent", "1e9"], "--level-rate-exponent"),
        (["--levels", "cms.0=" + "9" * 5000], "is a number of steps"),
        (["--set", "hidden_size=" + "9" * 5000], "must be JSON"),
        (["--steps", "many"], "Invalid value for '--steps'"),
        (["--stepz", "3"], "--stepz"),
        (["--resume"], "no run to resume"),
    ]
    for arguments, message in cases:
        assert message in fails(capsys, "train", *out, *arguments)
        assert not (tmp_path / "new").exists()
    assert "--out" in fails(capsys, "train")
    assert "No such command" in fails(capsys, "trane")


def test_errors_of_models_and_states(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other, state = place / "run", place / "other", place / "state"
    prompt = ["--prompt", "a", "--max-new-tokens", "1"]
    assert "was saved by another model" in fails(capsys, "generate", other, *prompt, "--state", state)
    assert "no state at" in fails(capsys, "generate", run, *prompt, "--state", tmp_path / "none")
    assert "no memory at" in fails(capsys, "generate", run, *prompt, "--memory", tmp_path / "none")
    (tmp_path / "bad").write_bytes(state.read_bytes()[:-50])
    assert "damaged" in fails(capsys, "generate", run, *prompt, "--state", tmp_path / "bad")
    assert "needs a --prompt" in fails(capsys, "generate", run, "--state", state)
    assert "no directory" in fails(capsys, "generate", run, *prompt, "--save-state", tmp_path / "no" / "file")
    assert "is a directory" in fails(capsys, "generate", run, *prompt, "--save-state", tmp_path)
    assert "--top-p 0" in fails(capsys, "generate", run, "--top-p", "0")
    assert "no file or directory" in fails(capsys, "generate", tmp_path / "nothing", *prompt)
    assert "holds no model" in fails(capsys, "generate", tmp_path, *prompt)
    assert "exclude each other" in fails(capsys, "evaluate", run, "--data", "x", "--carry", "--reset", "3")
    assert "no file or directory" in fails(capsys, "evaluate", run, "--data", tmp_path / "none")
    assert "no file or directory" in fails(capsys, "read", run, tmp_path / "none")


def test_unfinished_and_damaged_models(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(place / "run", broken)
    weights = load_file(broken / "model.safetensors")
    save_file({n: w for n, w in weights.items() if "norm" not in n}, broken / "model.safetensors", {"format": "pt"})
    for command in (["generate", broken, "--prompt", "a"], ["read", broken, place / "text.txt"]):
        assert "lacks" in fails(capsys, *command)  # transformers would draw them at random
    (broken / "model.safetensors").write_bytes(b"nonsense")
    assert "cannot be loaded" in fails(capsys, "generate", broken, "--prompt", "a")
    (broken / "config.json").unlink()
    assert "is not finished; finish it with nestling train" in fails(capsys, "generate", broken, "--prompt", "a")


def test_a_state_that_cannot_be_written_leaves_the_old_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nestling.memory import checked_file

    target = tmp_path / "state"
    target.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checked_file, "save_file", full)
    capsys.readouterr()
    assert main(["read", str(place / "run"), str(place / "text.txt"), "--save-state", str(target)]) == 2
    error = capsys.readouterr().err
    assert "No space left" in error and "earlier file there is intact" in error and error.count("\n") == 1
    assert target.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_diverging_run_names_step_and_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", *SMALL, "--out", str(tmp_path / "run"), "--lr", "1e30", "--warmup-steps", "0"]
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: training stopped at step ") and error.count("\n") == 1
    assert "holds NaN or infinity" in error or "gave NaN or infinity" in error
    assert "start a new run with a lower --lr" in error


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nestling.training import NestlingTrainer

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(NestlingTrainer, "training_step", interrupt)
    assert main(["train", *SMALL, "--out", str(tmp_path / "run")]) == 130
    assert f"continue with: nestling train --out {tmp_path / 'run'} --resume" in capsys.readouterr().err


def test_lists_and_overrides_of_the_command_line() -> None:
    given = ["train", "--data", "a", "b", "--steps", "3", "--valid", "c", "d", "e"]
    spread = ["train", "--data", "a", "--data", "b", "--steps", "3", *("--valid", "c", "--valid", "d", "--valid", "e")]
    assert spread_lists(given) == spread
    assert spread_lists(["read", "run", "a", "b"]) == ["read", "run", "a", "b"]
    assert parse_overrides(["a=1", "b=[2, null]", "c=true"]) == {"a": 1, "b": [2, None], "c": True}
    with pytest.raises(UserError, match="must be JSON"):
        parse_overrides(["a=x"])
