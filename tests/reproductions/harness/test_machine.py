"""Arguments of an experiment's machine, and its name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
import torch

from reproductions.harness.machine import add_machine_arguments, hardware, processor_name, use_machine


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_machine_arguments(parser)
    return parser.parse_args(list(words))


def test_arguments_are_applied() -> None:
    args = parse("--threads", "1", "--matmul-precision", "high")
    use_machine(args)
    assert args.device == "cpu" and torch.get_num_threads() == 1 and torch.get_float32_matmul_precision() == "high"
    assert hardware("cpu") == f"{processor_name()}, high"


def test_without_arguments_products_are_exact() -> None:
    use_machine(parse())
    assert hardware(torch.device("cpu")).endswith(", highest") and processor_name()


def test_unknown_precision_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--matmul-precision", "low")
    assert "highest" in capsys.readouterr().err
