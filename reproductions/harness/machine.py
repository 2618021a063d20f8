"""Where an experiment runs: its arguments on the command line, and the hardware's name for its results."""

from __future__ import annotations

import argparse
import functools
import platform
import subprocess
from pathlib import Path

import torch

import nestling


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """--device, --threads and --matmul-precision; `use_machine` applies them."""
    parser.add_argument("--device", default="cpu", help="of the model, as torch names it (default: cpu)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--matmul-precision", choices=("highest", "high", "medium"), default="highest", help="of float32 products"
    )


def use_machine(args: argparse.Namespace) -> None:
    """Threads and precision for the whole process."""
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.matmul_precision)


def hardware(device: torch.device | str) -> str:
    """The device's name and the precision of float32 products, as "Intel Xeon, highest"."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return f"{name}, {torch.get_float32_matmul_precision()}"


def processor_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def stamp(command: str) -> dict[str, str | int]:
    """What makes a row now: commit (with a + where files differ from it), machine, threads, torch, command."""
    made: dict[str, str | int] = {"commit": commit(), "machine": processor_name(), "threads": torch.get_num_threads()}
    return made | {"torch": torch.__version__, "command": command}


@functools.cache
def commit() -> str:
    """The repository's commit, with a + where tracked files of the library or of the reproductions differ from it; the
    library's version outside of a repository."""
    here = Path(__file__).parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", ":(glob)reproductions/**/*.py")
        return git("rev-parse", "--short=7", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {nestling.__version__}"
