"""Where an experiment runs: its arguments on the command line, and the hardware's name for its results."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch


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
