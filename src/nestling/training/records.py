"""The record of a run: `metrics.jsonl`, TensorBoard events, and the validation measurements in between."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nestling.evaluation.language import LossReport
from nestling.training.checkpoint import write_text
from nestling.training.progress import TrainingDisplay

if TYPE_CHECKING:
    from nestling.training.trainer import NestlingTrainer

METRICS_FILE = "metrics.jsonl"


class RunRecorder(TrainerCallback):
    """Measures, writes and shows what happens in a run.

    Attributes:
        trainer: set after the trainer is made.
        last_report: the latest validation.
        last_loss: the latest training loss that was written.
    """

    trainer: NestlingTrainer

    def __init__(
        self,
        out: Path,
        display: TrainingDisplay,
        validate: Callable[[], LossReport],
        *,
        tokens_per_step: int,
        log_every: int,
        eval_every: int,
        tensorboard: bool,
    ) -> None:
        """Args: the run's directory; the display; a function that measures the held-out text; steps between records."""
        self.out, self.display, self.validate = out, display, validate
        self.tokens_per_step, self.log_every, self.eval_every = tokens_per_step, log_every, eval_every
        self.tensorboard = tensorboard
        self.last_report: LossReport | None = None
        earlier = [r["loss"] for r in read_metrics(out / METRICS_FILE) if "loss" in r]
        self.last_loss = earlier[-1] if earlier else math.nan
        self._writer: Any = None
        self._lr = 0.0
        self._clock = 0.0
        self._logged_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the files; records past the step a run resumes from are dropped, they will be written again."""
        step = state.global_step
        if args.should_save:
            trim_metrics(self.out / METRICS_FILE, step)
            if self.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1 if step else None)
        self._clock = time.perf_counter()
        self._logged_step = step
        self.display.start(step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The learning rate of this step; the scheduler moves on before `on_step_end`."""
        assert self.trainer.optimizer is not None
        self._lr = float(self.trainer.optimizer.param_groups[0]["lr"])
        if self.trainer.meter is not None:
            self.trainer.meter.before_step(self.trainer.optimizer, self._due(state.global_step + 1, state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the records that are due. Comes before the checkpoint of the step is written."""
        step = state.global_step
        rate = (step - self._logged_step) * self.tokens_per_step / max(time.perf_counter() - self._clock, 1e-9)
        count = max(self.trainer.loss_count, 1)
        self.display.advance(step, self.trainer.loss_sum / count, rate)
        if self.trainer.meter is not None:
            self.trainer.meter.after_step()
        if self._due(step, state):
            self._log_training(step, rate)
            self._log_levels(step)
        if step % self.eval_every == 0 or step == state.max_steps:
            self._log_validation(step)

    def close(self) -> None:
        """Close the files and the bar; also after a failure."""
        self.display.stop()
        if self._writer is not None:
            self._writer.close()

    def _log_training(self, step: int, rate: float) -> None:
        self.last_loss = self.trainer.take_mean_loss()
        record = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "loss": self.last_loss,
            "lr": self._lr,
            "grad_norm": self.trainer.grad_norm,
            "tokens_per_s": round(rate, 1),
        }
        self._write(record, "train")
        self._clock, self._logged_step = time.perf_counter(), step

    def _due(self, step: int, state: TrainerState) -> bool:
        """Whether a training record follows a step."""
        return step % self.log_every == 0 or step == state.max_steps

    def _log_levels(self, step: int) -> None:
        if self.trainer.meter is not None:
            began = time.perf_counter()
            self._write({"step": step} | self.trainer.meter.measure(), "levels", shown=False)
            self._clock += time.perf_counter() - began

    def _log_validation(self, step: int) -> None:
        began = time.perf_counter()
        report = self.last_report = self.validate()
        record = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "val_loss": report.loss,
            "perplexity": report.perplexity,
            "bits_per_byte": report.bits_per_byte,
        }
        self._write(record, "validation")
        self._clock += time.perf_counter() - began  # speed means training speed

    def _write(self, record: dict[str, Any], group: str, shown: bool = True) -> None:
        if shown:
            self.display.log(record)
        if not self.trainer.args.should_save:
            return
        with open(self.out / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._writer is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, record["step"])
            self._writer.flush()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`. A last line that a killed process left unfinished is passed over."""
    file = Path(path)
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def trim_metrics(path: Path, step: int) -> None:
    """Drop the records after `step` from the file."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
