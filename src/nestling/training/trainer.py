"""The Hugging Face Trainer with what it lacks: carried state, checkpoints that exist whole or not at all, and a stop
with a name when something breaks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from nestling.errors import UserError
from nestling.levels.assignment import multi_frequency
from nestling.levels.measures import LevelMeter
from nestling.models.cache import ModelState
from nestling.models.causal_lm import NestlingForCausalLM
from nestling.optim import build
from nestling.processes import local_process_count
from nestling.training.carried import load_carried, save_carried
from nestling.training.checkpoint import checkpoint_step, last_checkpoint, prune, staged_directory, staging_path
from nestling.training.config import TrainConfig
from nestling.training.divergence import DivergenceError, first_nonfinite, locate_nonfinite, locate_nonfinite_gradient
from nestling.training.layout import Layout
from nestling.training.rows import Row, StreamedRows, collate

POSITION_FILE = "position.json"
_FIELDS = {field.name for field in fields(TrainingArguments)}
# transformers 5.23 renamed the argument and warns of the old name.
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"


def training_arguments(config: TrainConfig, layout: Layout) -> TrainingArguments:
    """The Trainer's settings for a resolved run; logging, evaluation and rotation are this package's own.

    Raises:
        UserError: more processes on this machine than it has GPUs.
    """
    assert config.steps is not None and config.learning_rate is not None and config.warmup_steps is not None
    on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    if not on_cpu and (local := local_process_count()) > (found := torch.accelerator.device_count()):
        raise UserError(
            f"{local} processes on this machine need {local} GPUs, and it has {found}; start at most {found}, or train "
            "with --device cpu"
        )
    checkpointing: dict[str, Any] = {CHECKPOINTING: config.gradient_checkpointing}
    arguments = TrainingArguments(
        output_dir=config.out,
        per_device_train_batch_size=layout.batch_size,
        gradient_accumulation_steps=layout.micro_batches,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_lr_ratio},
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        max_grad_norm=config.grad_clip,
        bf16=config.precision == "bf16",
        use_cpu=on_cpu,  # several processes find each other on CPUs only where this is said
        **checkpointing,
        seed=config.seed,
        use_cache=True,  # the Trainer writes it into the saved model's config
        train_sampling_strategy="sequential",  # the rows are in order already
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available() and not on_cpu,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=None,
        ddp_find_unused_parameters=True,  # a slow level has no gradient in a row shorter than its period
        disable_tqdm=True,
        report_to="none",
    )
    _ = arguments.device  # counts the GPUs
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process is a replica: no DataParallel, which cannot carry states
    return arguments


def _detach_state(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook: cuts the new state from the graph inside the model, where data-parallel wrappers see it.

    They would otherwise wait for gradients of parameters that the state depends on and the loss does not.
    """
    if output.past_key_values is not None:
        output.past_key_values = output.past_key_values.detach()
    return output


class NestlingTrainer(Trainer):
    """Trains a `NestlingForCausalLM` on rows of `input_ids`, `targets` and `fresh` (see `nestling.training.rows`).

    Attributes:
        net: the model, whatever the Trainer wraps around it.
        out: the run's directory.
        carried: the state after the last micro-batch, detached, when states are carried.
        grad_norm: norm of the last step's gradients before clipping.
        layout: how rows are shared out.
        loss_sum, loss_count: of this process's rows since the last log, their losses and their number.
        meter: measures the levels, when it is set before training.
    """

    def __init__(
        self,
        model: NestlingForCausalLM,
        args: TrainingArguments,
        train_dataset: Dataset[Row],
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        *,
        carry_state: bool = False,
        keep_checkpoints: int = 2,
        optimizer_name: str = "adamw",
        levels: Mapping[str, int] | None = None,
        level_rate_exponent: float = 0.0,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """Args: as the Trainer's; how rows are shared out; keep states between steps; how many of the newest
        checkpoints stay; a name of `optim.build`; levels of the optimizer with their periods in steps, and the exponent
        of their rates (`levels.assignment`).
        """
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False  # each micro-batch's loss is its own mean: the Trainer divides
        self.remove_callback(PrinterCallback)
        self.net = model
        self.out = Path(str(args.output_dir))
        self.layout = layout
        self.carry_state = carry_state
        self.keep_checkpoints = keep_checkpoints
        self.optimizer_name = optimizer_name
        self.levels = dict(levels or {})
        self.level_rate_exponent = level_rate_exponent
        self.meter: LevelMeter | None = None
        self.carried: ModelState | None = None
        self.grad_norm = 0.0
        self.loss_sum = 0.0
        self.loss_count = 0
        self._broken: str | None = None
        self._staging_root: str | None = None

    def train(self, resume_from_checkpoint: str | None = None) -> Any:  # type: ignore[override]
        """Train to `max_steps`, from a checkpoint directory if one is given."""
        if resume_from_checkpoint is not None:
            if checkpoint_step(Path(resume_from_checkpoint)) >= self.args.max_steps:
                return self._load_from_checkpoint(resume_from_checkpoint)  # killed between the last step and the end
            position = _read_position(Path(resume_from_checkpoint))
            if self.args.process_index == 0:  # the sums of all
                # Version 0.1 counted micro-batches, all of one size.
                rows = 1 if position.get("loss_of_rows") else self.layout.batch_size
                self.loss_sum, self.loss_count = position["loss_sum"] * rows, position["loss_count"] * rows
            if self.meter is not None and position.get("meter") is not None:
                self.meter.load_state_dict(position["meter"])
            if isinstance(self.train_dataset, StreamedRows):
                self.train_dataset.load_state_dict(position["rows"])
                self.args.ignore_data_skip = True
        hook = self.net.register_forward_hook(_detach_state)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint)
        finally:
            hook.remove()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The named optimizer, or one of them for every level."""
        if self.optimizer is not None:
            return self.optimizer
        a, model = self.args, model or self.net
        named = partial(
            build,
            self.optimizer_name,
            model,
            lr=a.learning_rate,
            weight_decay=a.weight_decay,
            betas=(a.adam_beta1, a.adam_beta2),
            process_group=dist.group.WORLD if a.world_size > 1 else None,
        )
        exponent = self.level_rate_exponent
        self.optimizer = multi_frequency(model, self.levels, named, exponent) if self.levels else named()
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean cross entropy of a micro-batch, read with the carried state where there is one.

        Raises:
            DivergenceError: the loss is not finite.
        """
        state = None if not self.carry_state or bool(inputs["fresh"].all()) else self.carried
        out = model(
            input_ids=inputs["input_ids"],
            shift_labels=inputs["targets"],
            past_key_values=state,
            use_cache=self.carry_state,
            logits_to_keep=1,  # only the loss is used
        )
        loss, value = out.loss, out.loss.item()
        if not torch.isfinite(loss):
            where = locate_nonfinite(self.net, inputs["input_ids"], state)
            self._broken = f"the loss is {value}: {where}"
            if self.args.world_size == 1:
                raise self._diverged(self._broken)
        if self.carry_state:
            self.carried = out.past_key_values
        rows = len(inputs["input_ids"])
        self.loss_sum += value * rows
        self.loss_count += rows
        return (loss, out) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch; looks at the gradients once they are complete, before clipping.

        Raises:
            DivergenceError: the loss or a gradient is not finite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self.grad_norm = float(nn.utils.get_total_norm(gradients))
            if not math.isfinite(self.grad_norm) and self._broken is None:
                self._broken = locate_nonfinite_gradient(self.net)
            self._stop_where_broken()
        return loss

    def take_mean_loss(self) -> float:
        """Mean loss over the rows, of all processes, since the last call."""
        total, count = self._losses_of_all()
        self.loss_sum, self.loss_count = 0.0, 0
        return total / max(count, 1)

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes joined along the first axis, on the CPU."""
        if self.args.world_size == 1:
            return tensor
        return self.accelerator.gather(tensor.to(self.args.device)).cpu()

    def _losses_of_all(self) -> tuple[float, int]:
        found = self.gather(torch.tensor([[self.loss_sum, self.loss_count]], dtype=torch.float64)).sum(0)
        return float(found[0]), int(found[1])

    def _stop_where_broken(self) -> None:
        """Stop all processes where one of them has found something broken: the others would wait for it for ever."""
        if not bool(self.gather(torch.tensor([float(self._broken is not None)])).any()):
            return
        found = [self._broken] if self.args.world_size == 1 else gather_object([self._broken])
        raise self._diverged(next(where for where in found if where is not None))

    def _diverged(self, where: str) -> DivergenceError:
        kept = last_checkpoint(self.out)
        state = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been written"
        advice = f"{state}; start a new run with a lower --lr (now {self.args.learning_rate:g})"
        return DivergenceError(self.state.global_step + 1, where, advice)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging_root or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the Trainer's checkpoint and what is carried beside it, then let it appear under its name."""
        if (name := first_nonfinite(self.net.named_parameters())) is not None:
            raise self._diverged(f"parameter {name} holds NaN or infinity after the step")
        target = self.out / f"checkpoint-{self.state.global_step}"
        self._staging_root = str(staging_path(target).parent)
        try:
            with staged_directory(target) if self.args.should_save else nullcontext():
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self._save_position(staging_path(target))
                self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError, RuntimeError) as error:
            raise self._not_saved(error) from error
        finally:
            self._staging_root = None
        if self.args.should_save:
            prune(self.out, self.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _save_position(self, directory: Path) -> None:
        total, count = self._losses_of_all()
        if self.carried is not None:
            save_carried(directory, self.carried, self.net, self.layout.process)
        if self.args.should_save:
            rows = None
            if isinstance(self.train_dataset, StreamedRows):
                rows = self.train_dataset.state_dict(self.state.global_step * self.layout.turns)
            position = {"loss_sum": total, "loss_count": count, "loss_of_rows": True, "rows": rows}
            position["meter"] = None if self.meter is None else self.meter.state_dict()
            (directory / POSITION_FILE).write_text(json.dumps(position), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights, and then the state that was carried with them."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.carry_state:
            carried = load_carried(Path(resume_from_checkpoint), self.net, self.layout)
            self.carried = carried.to(self.args.device)

    def _not_saved(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:160]
        kept = last_checkpoint(self.out)
        fallback = f"{kept} is intact" if kept else "there is no earlier one"
        return UserError(
            f"the checkpoint of step {self.state.global_step} could not be written ({reason}); {fallback}; free space "
            f"on the disk of {self.out}, then run the same command with --resume"
        )


def _read_position(checkpoint: Path) -> dict[str, Any]:
    """Where the data stood, and the losses since the last record.

    Raises:
        UserError: the file is damaged.
    """
    try:
        position: dict[str, Any] = json.loads((checkpoint / POSITION_FILE).read_text(encoding="utf-8"))
        float(position["loss_sum"]), int(position["loss_count"])
        return position
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{checkpoint / POSITION_FILE} is damaged ({str(error)[:100]}); remove {checkpoint}, and --resume goes on "
            "from the checkpoint before it"
        ) from error
