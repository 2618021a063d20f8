"""A whole training run: from settings to a directory that loads with `AutoModelForCausalLM`."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from nestling import NestlingForCausalLM, __version__
from nestling.errors import UserError
from nestling.evaluation.language import LossReport
from nestling.evaluation.sampling import continue_text, decode_continuation, end_tokens
from nestling.levels.assignment import assign_levels, continuum_levels, describe_levels, parse_levels
from nestling.levels.measures import LevelMeter
from nestling.printing import printable
from nestling.processes import is_main_process, process_count, process_index
from nestling.training.build import build_model, check_preset, say_untrained, with_own_levels
from nestling.training.checkpoint import (
    clear_leftovers,
    last_checkpoint,
    move_files,
    staged_directory,
    write_json,
)
from nestling.training.config import CONFIG_FILE, TrainConfig, begun_with, differences, read_run
from nestling.training.corpus import TrainingData, prepare_data
from nestling.training.layout import Layout, share_rows
from nestling.training.progress import TrainingDisplay, clock
from nestling.training.records import METRICS_FILE, RunRecorder
from nestling.training.tokenization import encode_text, special_ids, start_token
from nestling.training.trainer import NestlingTrainer, training_arguments
from nestling.training.validation import validation_loss

RESULT_FILE = "result.json"
SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True)
class TrainResult:
    """What a finished run came to.

    Attributes:
        out: the run's directory.
        steps, tokens: trained in all, before and after any resumption.
        parameters: of the model, with embeddings.
        train_loss: nats per token, mean since the last but one log.
        validation: on the held-out text, after the last step.
        sample: prompt and text written by the trained model.
        seconds: wall time of this call; a resumed run counts only since it was resumed.
    """

    out: Path
    steps: int
    tokens: int
    parameters: int
    train_loss: float
    validation: LossReport
    sample: str
    seconds: float


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Train a model and save it.

    `config.out` then holds the model and its tokenizer (`AutoModelForCausalLM` and `AutoTokenizer` load it), the
    settings in `train_config.json`, the measurements in `metrics.jsonl` and `tensorboard/`, the newest checkpoints,
    and `result.json`. With `resume` a run goes on from its newest checkpoint, or from the start where it has none yet,
    and computes what it would have computed without the interruption.

    Started several times by a launcher (`torchrun`), all processes call this and train one model: they share the rows,
    each of `config.batch_size`, and the first one writes and reports. The run computes what one process with all the
    rows would, to rounding, and can be resumed by another number of processes.

    Args:
        config: the settings. A resumed run must have the settings it began with, but for those that only concern
            records (`FREE_ON_RESUME`).
        resume: continue the run in `config.out`.
        console: where to report; None reports nothing.

    Raises:
        UserError: whatever the user can put right; before the first step nothing has been written.
        DivergenceError: the loss, a gradient or a parameter stopped being finite.

    Examples:
        >>> from pathlib import Path
        >>> from nestling.training import TrainConfig, train
        >>> text = Path("text.txt").write_text("The rain in Spain stays mainly in the plain. " * 40)
        >>> model = {"preset": "hope_linear", "overrides": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
        >>> rows = {"data": ("text.txt",), "batch_size": 2, "sequence_length": 32, "steps": 2}
        >>> train(TrainConfig(out="run", **model, **rows, device="cpu", tensorboard=False, sample_tokens=0)).steps
        2
    """
    began = time.perf_counter()
    console = console if console is not None and is_main_process() else Console(quiet=True)
    out = Path(config.out)
    checkpoint = last_checkpoint(out) if resume else None
    began_with = begun_with(out, checkpoint) if resume else process_count()
    config = config.resolved(began_with)
    if checkpoint is None and not (resume and config.levels):  # a run that began needs what it began with no more
        config = with_own_levels(config, began_with)
    check_preset(config.preset, config.size, config.overrides)
    record = _check_resume(config) if resume else _check_new(out)
    if resume and (out / RESULT_FILE).exists():
        _say(console, "done", f"the run in {out} is finished already")
        return _read_result(out)
    layout = share_rows(config, began_with, process_count(), process_index())
    begin_at = config.init if checkpoint is None else str(checkpoint)
    data = prepare_data(config, layout, begin_at)
    if record and record.get("digest") != data.digest:
        raise UserError(f"the training data of {out} has changed since the run began; restore it, or start a new run")
    model = build_model(config, data.tokenizer, begin_at)
    if config.levels:
        assign_levels(model, parse_levels(config.levels))  # names that do not exist, before anything is written
    if is_main_process():
        _begin(out, config, data, began_with)
        _introduce(console, config, data, model, checkpoint, layout)
    trainer, recorder = _make_trainer(config, data, model, console, layout)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(config.matmul_precision)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        recorder.close()
        torch.set_float32_matmul_precision(before)
    return _finish(config, data, trainer, recorder, console, began)


def _check_new(out: Path) -> dict[str, Any]:
    if not is_main_process():  # the first process may have begun to write already
        return {}
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a directory with --out")
    if (out / CONFIG_FILE).exists():
        raise UserError(f"{out} already holds a run; continue it with --resume, or choose another --out")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose a new or an empty directory with --out")
    return {}


def _check_resume(config: TrainConfig) -> dict[str, Any]:
    saved, record = read_run(config.out)
    if changed := differences(saved, config):
        listed = "; ".join(changed)
        raise UserError(
            f"the run in {config.out} has other settings ({listed}); resume without them, or start a new run"
        )
    return record


def _begin(out: Path, config: TrainConfig, data: TrainingData, processes: int) -> None:
    """Make the directory and write what identifies the run, or clear up after a killed process."""
    out.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out)
    record = {"description": data.description, "digest": data.digest}
    run = {"nestling": __version__, "processes": processes, "config": config.to_dict(), "data": record}
    write_json(out / CONFIG_FILE, run)


def _introduce(
    console: Console,
    config: TrainConfig,
    data: TrainingData,
    model: NestlingForCausalLM,
    checkpoint: Path | None,
    layout: Layout,
) -> None:
    _say(console, "data", data.description)
    what = f"{config.preset}, size {config.size}" if config.init is None else f"from {config.init}"
    vocabulary = f"vocabulary {len(data.tokenizer):,} ({config.tokenizer if config.init is None else 'its own'})"
    _say(console, "model", f"{what}: {model.num_parameters():,} parameters, {vocabulary}")
    carry = ", state carried between steps" if config.carry_state else ""
    steps = f"{config.steps:,} steps of {layout.rows * config.sequence_length:,} tokens"
    shared = f", shared by {layout.processes} processes" if layout.processes > 1 else ""
    rows = f"sequences of {config.sequence_length}{carry}{shared}"
    if config.levels:
        _say(console, "levels", describe_levels(model, parse_levels(config.levels)))
    _say(
        console,
        "run",
        f"{steps} ({rows}), {config.optimizer}, learning rate {config.learning_rate:g}, into {config.out}",
    )
    if note := say_untrained(model.config, config.sequence_length, config.carry_state):
        _say(console, "note", note)
    if checkpoint is not None:
        _say(console, "resume", f"from {checkpoint}")


def _say(console: Console, label: str, text: str) -> None:
    console.print(Text.assemble((f"{label:<7}", "bold"), text), soft_wrap=True)


def _make_trainer(
    config: TrainConfig, data: TrainingData, model: NestlingForCausalLM, console: Console, layout: Layout
) -> tuple[NestlingTrainer, RunRecorder]:
    def validate() -> LossReport:
        return validation_loss(
            trainer.net,
            data.valid,
            config.sequence_length,
            layout,
            trainer.gather,
            carry=config.carry_state,
            n_bytes=data.valid_bytes,
        )

    recorder = RunRecorder(
        Path(config.out),
        TrainingDisplay(console, config.steps or 0),
        validate,
        tokens_per_step=layout.rows * config.sequence_length,
        log_every=config.log_every,
        eval_every=config.eval_every,
        tensorboard=config.tensorboard,
    )
    trainer = NestlingTrainer(
        model,
        training_arguments(config, layout),
        data.rows,
        data.tokenizer,
        layout,
        carry_state=config.carry_state,
        keep_checkpoints=config.keep_checkpoints,
        optimizer_name=config.optimizer,
        levels=parse_levels(config.levels) if config.levels else None,
        level_rate_exponent=config.level_rate_exponent,
        callbacks=[recorder],
    )
    recorder.trainer = trainer
    if config.measure_levels:
        trainer.meter = LevelMeter(model, assign_levels(model, _level_periods(config, model)))
    return trainer, recorder


def _level_periods(config: TrainConfig, model: NestlingForCausalLM) -> dict[str, int]:
    """The levels to measure: the run's, else those of the continuum, all updated at every step."""
    return parse_levels(config.levels) if config.levels else dict.fromkeys(continuum_levels(model), 1)


def _finish(
    config: TrainConfig,
    data: TrainingData,
    trainer: NestlingTrainer,
    recorder: RunRecorder,
    console: Console,
    began: float,
) -> TrainResult:
    """Save the model, write a sample, and say how it went."""
    model = trainer.accelerator.unwrap_model(trainer.net, keep_fp32_wrapper=False)
    model.config.loss_chunk_size = None  # a matter of training memory; who loads the model expects logits
    report = recorder.last_report or recorder.validate()  # a run killed after its last checkpoint has no report
    steps = config.steps or 0
    length = config.sample_tokens if trainer.args.should_save else 0
    sample = sample_text(model, data.tokenizer, config.sample_prompt, length, config.seed)
    result = TrainResult(
        out=Path(config.out),
        steps=steps,
        tokens=steps * recorder.tokens_per_step,
        parameters=model.num_parameters(),
        train_loss=recorder.last_loss,
        validation=report,
        sample=sample,
        seconds=time.perf_counter() - began,
    )
    if trainer.args.should_save:
        _save_model(result.out, model, data.tokenizer)
        write_json(result.out / RESULT_FILE, asdict(result) | {"out": config.out})
    bits = report.bits_per_byte
    quality = f"validation loss {report.loss:.4f}, perplexity {report.perplexity:.2f}"
    quality += "" if bits is None else f", bits per byte {bits:.4f}"
    _say(console, "done", f"{result.tokens:,} tokens in {clock(result.seconds)}; {quality}")
    if sample:
        console.rule("sample")
        console.print(printable(sample), markup=False, highlight=False)
        console.rule()
    _say(console, "saved", f"in {config.out}; measurements in {Path(config.out) / METRICS_FILE}")
    return result


def sample_text(
    model: NestlingForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, seed: int
) -> str:
    """The prompt and a continuation at temperature 0.8; an empty string for no tokens."""
    if max_new_tokens == 0:
        return ""
    start = start_token(tokenizer)
    ids = [start, *encode_text(tokenizer, prompt).tolist()]
    written, _ = continue_text(
        model,
        ids,
        max_new_tokens,
        temperature=SAMPLE_TEMPERATURE,
        top_p=0.95,
        seed=seed,
        stop=end_tokens(model, tokenizer),
        never=special_ids(tokenizer),
    )
    return prompt + decode_continuation(tokenizer, ids, written)


def _save_model(out: Path, model: NestlingForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        with staged_directory(out / "final") as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        move_files(out / "final", out)
        shutil.rmtree(out / "final", ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the trained model could not be written ({error}); the checkpoints in {out} are intact, free space on its "
            "disk and run the same command with --resume"
        ) from error


def _read_result(out: Path) -> TrainResult:
    try:
        values = json.loads((out / RESULT_FILE).read_text(encoding="utf-8"))
        return TrainResult(**values | {"out": out, "validation": LossReport(**values["validation"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{out / RESULT_FILE} is damaged ({str(error)[:100]}); remove it, and --resume finishes the run again"
        ) from error
