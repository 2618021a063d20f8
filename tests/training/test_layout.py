"""How rows are shared out, and validation and carried states with them, without starting a process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nestling import presets
from nestling.errors import UserError
from nestling.evaluation.language import evaluate_loss
from nestling.models import NestlingForCausalLM
from nestling.training import TrainConfig
from nestling.training.carried import joined, load_carried, save_carried
from nestling.training.layout import Layout, share_rows
from nestling.training.validation import validation_loss

WINDOWED = {"hidden_size": 16, "num_layers": 1, "num_heads": 1}


@pytest.fixture(scope="module")
def model() -> NestlingForCausalLM:
    """A tiny hope."""
    torch.manual_seed(1)
    return NestlingForCausalLM(presets.hope(size="tiny", vocab_size=50, **WINDOWED)).eval()


@pytest.mark.parametrize(
    ("batch_size", "turns", "began", "now", "expected"),
    [
        (4, 1, 1, 1, (4, 1)),
        (2, 3, 2, 2, (2, 3)),
        (4, 1, 1, 2, (2, 1)),
        (2, 1, 2, 1, (2, 2)),
        (2, 3, 2, 4, (1, 3)),
        (3, 2, 1, 2, (3, 1)),
        (5, 2, 2, 1, (5, 4)),
        (7, 2, 1, 2, (7, 1)),
    ],
)
def test_the_rows_of_a_step_stay_and_no_process_reads_more_at_once(
    batch_size: int, turns: int, began: int, now: int, expected: tuple[int, int]
) -> None:
    config = TrainConfig(out="r", batch_size=batch_size, gradient_accumulation=turns)
    found = share_rows(config, began, now)
    assert (found.batch_size, found.micro_batches) == expected
    assert found.batch_size * found.micro_batches * now == found.rows == batch_size * turns * began
    assert found.batch_size <= batch_size


def test_carried_streams_are_shared_whole() -> None:
    config = TrainConfig(out="r", batch_size=4, gradient_accumulation=3, carry_state=True)
    assert share_rows(config, 1, 2) == Layout(4, 3, 2, batch_size=2, micro_batches=3)
    assert share_rows(config, 2, 1) == Layout(8, 3, 1, batch_size=8, micro_batches=3)


def test_rows_that_cannot_be_shared_are_refused() -> None:
    config = TrainConfig(out="r", batch_size=2, gradient_accumulation=2)
    with pytest.raises(UserError, match="the run in r has 4 rows in a step, which 3 processes cannot share equally"):
        share_rows(config, 1, 3)
    with pytest.raises(UserError, match="2 rows side by side, which 4 processes cannot share"):
        share_rows(replace(config, carry_state=True), 1, 4)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [2, 5, 40, 101])
def test_validation_is_that_of_one_process(
    model: NestlingForCausalLM, carry: bool, processes: int, tokens: int
) -> None:
    text = np.random.default_rng(0).integers(0, 50, tokens)
    whole = evaluate_loss(model, text, 16, carry=carry, batch_size=8)
    found: list[torch.Tensor] = []
    for gathering in (found.append, None):  # first every process's part, then what they all get
        for process in range(processes):
            layout = Layout(8, 1, processes, 8 // processes, 1, process)

            def gather(part: torch.Tensor, keep: Callable[[torch.Tensor], None] | None = gathering) -> torch.Tensor:
                if keep is not None:
                    keep(part)
                    return torch.ones(1, 2)
                return torch.cat(found)

            report = validation_loss(model, text, 16, layout, gather, carry=carry, n_bytes=7)
    assert report.tokens == whole.tokens == tokens - 1 and report.bytes == 7
    assert report.loss == pytest.approx(whole.loss, abs=1e-6)


@pytest.mark.parametrize("writers", [1, 2, 4])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_carried_states_are_read_by_any_number_of_processes(
    model: NestlingForCausalLM, tmp_path: Path, writers: int, readers: int
) -> None:
    ids = torch.arange(4 * 9).reshape(4, 9) % 50
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=True).past_key_values
    for process, rows in enumerate(torch.arange(4).chunk(writers)):
        save_carried(tmp_path, whole.select(rows), model, process)
    read = [load_carried(tmp_path, model, Layout(4, 1, readers, 4 // readers, 1, p)) for p in range(readers)]
    for (name, expected), (_, found) in zip(whole.tensors(), joined(read).tensors(), strict=True):
        assert torch.equal(expected, found), name
