"""DistributedDataParallel that does not search for parameters without a part in the loss."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.compat.subjects import FEW, SUBJECTS, batch, subject

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTING = {"plain": None, "checkpointing": False, "reentrant": True}


@pytest.fixture(scope="module")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process: DistributedDataParallel waits for parameters there too."""
    path = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        pytest.param(name, how, id=f"{name}-{said}", marks=() if how is None or name in FEW else pytest.mark.slow)
        for said, how in CHECKPOINTING.items()
        for name in SUBJECTS
    ],
)
def test_rows_shorter_than_a_levels_period(name: str, checkpointing: bool | None) -> None:
    """Two steps, for the first one is forgiven; the bare model's gradients, and 0 where it has none."""
    ids = batch(2, 3)
    alone = subject(name).train()
    alone(ids, labels=ids, use_cache=False).loss.backward()
    model = subject(name).train()
    if checkpointing is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": checkpointing})
    spread = DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        spread(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for (part, p), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, torch.zeros_like(p) if expected.grad is None else expected.grad, msg=part)


@pytest.mark.usefixtures("_alone")
def test_the_search_still_finds_what_has_no_part() -> None:
    """No gradient stays none, so that an optimizer leaves such a level alone."""
    ids = batch(2, 3)
    alone = subject("hope").train()
    alone(ids, labels=ids, use_cache=False).loss.backward()
    model = subject("hope").train()
    spread = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):
        model.zero_grad()
        spread(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without
    assert without == [n for n, p in alone.named_parameters() if p.grad is None]


WORKER = """
import sys, tempfile, torch
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator
from tests.compat.subjects import documents, subject
torch.set_num_threads(1)
for name in sys.argv[1:]:
    for checkpointing in (False, True):
        rows = [{"input_ids": row, "labels": row} for row in documents(*[7] * 8)]
        settings = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_checkpointing": checkpointing}
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "use_cpu": True}
        arguments = TrainingArguments(tempfile.mkdtemp(), ddp_find_unused_parameters=False, **settings, **quiet)
        trainer = Trainer(subject(name), arguments, train_dataset=rows, data_collator=default_data_collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if trainer.is_world_process_zero():
            losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
            print("losses", name, len(losses), all(0 < loss < 20 for loss in losses))
"""


@pytest.mark.slow
def test_the_trainer_on_two_processes(tmp_path: Path) -> None:
    names = ("hope", "converted llama")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([*command, *names], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True") == 2 * len(names)
