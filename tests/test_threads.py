"""How OpenMP threads wait: settled for this project's command lines, and never over what the user has said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nestling.threads import PROGRAMS, SAID_BY_THE_USER, SPINS, VARIABLE, is_own_command, wait_briefly

ROOT = Path(__file__).resolve().parents[1]


def clean() -> dict[str, str]:
    """The environment as if the user had said nothing."""
    return {name: value for name, value in os.environ.items() if name not in SAID_BY_THE_USER}


@pytest.mark.parametrize("said", SAID_BY_THE_USER)
def test_what_the_user_said_stays(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SAID_BY_THE_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(said, "77")
    wait_briefly()
    assert {name: os.environ[name] for name in SAID_BY_THE_USER if name in os.environ} == {said: "77"}


def test_without_a_word_of_the_user_it_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SAID_BY_THE_USER:
        monkeypatch.delenv(name, raising=False)
    wait_briefly()
    assert os.environ[VARIABLE] == SPINS
    monkeypatch.delenv(VARIABLE)


@pytest.mark.parametrize(
    ("argv", "original", "own"),
    [
        (["/venv/bin/nestling", "train"], ["python", "/venv/bin/nestling", "train"], True),
        (["-m", "train"], ["python", "-u", "-m", "nestling", "train"], True),
        (["-m"], ["python", "-X", "dev", "-m", "nestling.demo"], True),
        (["/repo/reproductions/__main__.py", "mqar"], ["python", "-m", "reproductions", "mqar"], True),
        (["train.py"], ["python", "train.py", "-m", "other"], False),
        (["-m"], ["python", "-m", "torch.distributed.run", "-m", "nestling"], False),
        (["-m"], ["python", "-m", "nestlings"], False),
        (["-c"], ["python", "-c", "import nestling"], False),
    ],
)
def test_own_commands_are_known(
    argv: list[str], original: list[str], own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert is_own_command() is own


# What the process's environment holds at the moment when torch begins to be imported.
WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("spins", os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)
sys.meta_path.insert(0, Watch())
"""


@pytest.mark.parametrize(
    ("arguments", "spins"),
    [(["-m", "nestling", "--version"], SPINS), (["-m", "nestling.demo"], SPINS), (["-c", "import nestling"], "None")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_it_is_settled_before_torch_is_loaded(tmp_path: Path, arguments: list[str], spins: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments], env=clean() | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"spins {spins}\n", done.stderr


def test_the_makefile_uses_the_same_value() -> None:
    assert re.findall(rf"{VARIABLE}\W+(\d+)", (ROOT / "Makefile").read_text(encoding="utf-8")) == [SPINS]
    assert all(name in (ROOT / "Makefile").read_text(encoding="utf-8") for name in SAID_BY_THE_USER)
    assert "nestling" in PROGRAMS
