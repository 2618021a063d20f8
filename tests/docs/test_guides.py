"""The guides that say how to add something: their files exist, their edits fit, and what they add passes the tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDES = {
    "add_a_mixer.md": ["tests/layers/test_contract.py", "-k", "fading"],
    "add_an_optimizer.md": ["tests/optim/test_battery.py", "tests/optim/test_groups.py", "-k", "bounded"],
    "add_an_option.md": [
        "tests/continual/learner/test_thinning.py",
        "tests/test_cli_learn.py",
        "-k",
        "thinning or help",
    ],
}
BLOCK = re.compile(r'^```(python|diff) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def guide(name: str) -> str:
    """Its Markdown."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def apply_to(folder: Path, text: str) -> list[Path]:
    """Write the files and make the edits of a guide; what was changed."""
    changed = []
    for kind, name, body in BLOCK.findall(text):
        path = folder / name
        if kind == "python":
            assert not path.exists(), f"{name} exists"
            path.write_text(body, encoding="utf-8")
        else:
            lines = body.splitlines()
            before = "\n".join(line[1:] for line in lines if line[:1] != "+")
            after = "\n".join(line[1:] for line in lines if line[:1] != "-")
            found = path.read_text(encoding="utf-8")
            assert found.count(before) == 1, f"{name} has {found.count(before)} places like\n{before}"
            path.write_text(found.replace(before, after), encoding="utf-8")
        changed.append(path)
    return changed


def copy_project(folder: Path) -> None:
    """What the tests of the guides need."""
    for name in ("src", "tests", "benchmarks", "reproductions"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "cache", "*.svg", "*.jsonl")
        )
    shutil.copy(ROOT / "pyproject.toml", folder)


@pytest.mark.parametrize("name", GUIDES)
def test_the_files_to_touch_exist(name: str) -> None:
    """Every path of the table, with capitals for what is new."""
    paths = re.findall(r"`((?:src|tests|docs)/[\w./]*)`", guide(name))
    assert len(paths) >= 4
    missing = [p for p in paths if not re.search(r"[A-Z]{3}", p) and not (ROOT / p).exists()]
    new = {title for kind, title, _ in BLOCK.findall(guide(name)) if kind == "python"}
    assert not set(missing) - new


@pytest.mark.parametrize("name", GUIDES)
def test_the_edits_fit_and_stay_in_the_table(name: str, tmp_path: Path) -> None:
    """Every edit has its place in the present files, and the table names each file that is touched."""
    copy_project(tmp_path)
    changed = {str(p.relative_to(tmp_path)) for p in apply_to(tmp_path, guide(name))}
    table = re.findall(r"`((?:src|tests)/[\w./]*)`", guide(name).partition("## An example")[0])
    listed = {p for p in table if not re.search(r"[A-Z]{3}", p)}
    new = {p for p in changed if not (ROOT / p).exists()}
    assert changed - new <= listed and len([p for p in new if p.startswith("src")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_what_the_guide_adds_passes(name: str, tmp_path: Path) -> None:
    """In a copy of the project: the tests that the guide names, and a model or a step with what was added."""
    copy_project(tmp_path)
    changed = apply_to(tmp_path, guide(name))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *GUIDES[name]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"(\d+) passed", done.stdout)
    lint = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), *map(str, changed)]
    checked = subprocess.run(lint, cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    for block in re.findall(r"^```python\n(.*?)^```$", guide(name), re.MULTILINE | re.DOTALL):
        shown = subprocess.run([sys.executable, "-c", block], env=environment, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
