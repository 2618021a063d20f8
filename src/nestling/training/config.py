"""The settings of a training run, and their checks. They are saved in the run's directory as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from nestling.errors import UserError
from nestling.levels.assignment import parse_levels
from nestling.models.presets import PRESETS, SIZES
from nestling.optim.build import LIKE_ADAMW
from nestling.optim.build import NAMES as OPTIMIZERS
from nestling.processes import process_count
from nestling.settings import MOST_EXPONENT, check, setting

CONFIG_FILE = "train_config.json"
MODEL, DATA, OPTIMISATION, RECORDS = "Model", "Data", "Optimisation", "Records"  # headings of the command's help

# Settings that say what is written and shown, not what is computed; a resumed run may change them.
FREE_ON_RESUME = frozenset(
    {"out", "save_every", "keep_checkpoints", "tensorboard", "measure_levels", "sample_tokens", "sample_prompt"}
)


def parse_overrides(assignments: list[str] | None) -> dict[str, Any]:
    """What `--set` was given, `["hidden_size=64", "periods=[16, null]"]` as a dictionary; values are JSON.

    Raises:
        UserError: an assignment without `=`, or a value that is not JSON.
    """
    found: dict[str, Any] = {}
    for assignment in assignments or []:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise UserError(f"--set {assignment}: write NAME=VALUE, as in --set hidden_size=64")
        try:
            found[name.strip()] = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--set {assignment}: the value must be JSON (64, 0.5, true, null, [16, 64])") from error
    return found


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The defaults train `hope` at size `tiny` on the embedded corpus, some minutes on a CPU.

    Every field is a setting (`nestling.settings`): what its help says is what `nestling train --help` shows. Steps are
    optimizer steps throughout. More than a line is to be said of these:

    Model
        init: has its own tokenizer. The levels of a converted model (`models.convert`) are updated at their own
            periods, each to the nearest whole number of optimizer steps; `levels` overrides them.

    Data
        data: with `streaming` one set of the hub.
        tokenizer: of `bpe:SIZE` trained on the training part.

    Optimisation. AdamW with betas 0.9 and 0.95 (the choice of GPT-3 and most language models since), weight decay on
    matrices only, linear warm-up, cosine down to `min_lr_ratio` of the peak.
        learning_rate: 3e-3 suits `tiny`; 4e-4 of larger sizes is Titans' (section 5.1), 1e-4 with `init` that of the
            first trials with a pre-trained model, and 0.1 goes to optimizers whose steps have a gradient's size.
        batch_size: of each process, where there are several (`torchrun`): they are one run with the batch of all.
        warmup_steps: None means a tenth of the run, at most 2000.
        carry_state: every batch row reads one contiguous stream and keeps its state, detached, from step to step
            (truncated backpropagation through time).
        carry_tokens: None resets states at the end of a stream only. Models whose state grows with the text (full
            attention) need it.
        matmul_precision: as `torch.set_float32_matmul_precision` takes it: `high` allows TF32; `medium` allows
            bfloat16, and PyTorch then makes the products on a CPU too, which pays where the processor has them in
            hardware (AMX, AVX512-BF16).
        levels: update periods in optimizer steps (`levels.assignment.assign_levels` says what may be named); everything
            else has period 1, and with an empty string there is one level. A slow level is updated with the sum of its
            gradients
            (NL Eq. 71), each clipped to `grad_clip` at its own step.
        level_rate_exponent: see `MultiFrequency`.

    Records. An evaluation and a checkpoint also come at the end.
        measure_levels: with every training record, the levels of `levels`, or without any the continuum's
            (`levels.measures`). Takes a copy of the first weights.
        eval_tokens: from the start of the held-out text.
    """

    out: str = setting(help="Directory of the run; new, or empty.", metavar="DIR")

    preset: str = setting("hope", help=f"One of: {', '.join(PRESETS)}.", panel=MODEL)
    size: str = setting("tiny", help=f"One of: {', '.join(SIZES)}.", panel=MODEL)
    init: str | None = setting(
        None,
        help="Go on training this model, with its tokenizer and at the periods of its levels, instead of a preset.",
        panel=MODEL,
        metavar="DIR",
    )
    overrides: dict[str, Any] = setting(
        default_factory=dict,
        help="Change a setting of the preset.",
        panel=MODEL,
        flag="set",
        metavar="NAME=VALUE...",
        takes=list[str],
        parse=parse_overrides,
    )

    data: tuple[str, ...] = setting(
        (),
        help="Files or directories of UTF-8 text. Default: CPython's language reference, embedded.",
        panel=DATA,
        metavar="PATH...",
    )
    valid: tuple[str, ...] = setting(
        (),
        help="Text to validate on. Default: the last tenth of each corpus, held out.",
        panel=DATA,
        metavar="PATH...",
    )
    tokenizer: str = setting("bytes", help="bytes, bpe:SIZE, or a Hugging Face path or name.", panel=DATA)
    streaming: bool = setting(False, help="--data names a set of the hub, read as it arrives.", panel=DATA)
    subset: str | None = setting(None, help="Subset of a streamed set.", panel=DATA)
    split: str = setting("train", help="Split of a streamed set.", panel=DATA)
    column: str = setting("text", help="Text column of a streamed set.", panel=DATA)

    steps: int | None = setting(None, help="Optimizer steps. Default: 500.", panel=OPTIMISATION, at_least=1)
    tokens: int | None = setting(None, help="Budget in tokens, instead of --steps.", panel=OPTIMISATION, at_least=1)
    sequence_length: int = setting(256, help="Tokens in a row.", panel=OPTIMISATION, at_least=2)
    batch_size: int = setting(8, help="Rows in a batch, of each process.", panel=OPTIMISATION, at_least=1)
    gradient_accumulation: int = setting(1, help="Batches in an optimizer step.", panel=OPTIMISATION, at_least=1)
    carry_state: bool = setting(False, help="Read on with the state of the step before.", panel=OPTIMISATION)
    carry_tokens: int | None = setting(
        None, help="Reset carried states after so many tokens.", panel=OPTIMISATION, at_least=1
    )
    optimizer: str = setting("adamw", help="One of: {choices}.", panel=OPTIMISATION, metavar="NAME", choices=OPTIMIZERS)
    learning_rate: float | None = setting(
        None,
        help="Peak learning rate. Default: 3e-3 for tiny, 1e-4 with --init, else 4e-4; 0.1 for optimizers that step "
        "like sgd.",
        panel=OPTIMISATION,
        flag="lr",
        above=0,
        below=math.inf,
    )
    min_lr_ratio: float = setting(
        0.1, help="Last learning rate, as a part of the peak.", panel=OPTIMISATION, at_least=0, at_most=1
    )
    warmup_steps: int | None = setting(None, help="Default: a tenth of the run.", panel=OPTIMISATION, at_least=0)
    weight_decay: float = setting(0.1, help="On matrices only.", panel=OPTIMISATION, at_least=0, below=math.inf)
    beta1: float = setting(
        0.9,
        help="AdamW's; the momentum of optimizers that step like sgd.",
        panel=OPTIMISATION,
        at_least=0,
        below=1,
    )
    beta2: float = setting(0.95, help="AdamW's.", panel=OPTIMISATION, at_least=0, below=1)
    grad_clip: float = setting(1.0, help="Largest gradient norm.", panel=OPTIMISATION, above=0)
    levels: str = setting(
        "",
        help="Steps between two updates of a level, as in cms.0=1,cms.1=8,cms.2=64; a name is cms.N, a converted "
        "model's level, or a pattern of parameter names. Everything else: 1.",
        panel=OPTIMISATION,
        metavar="NAME=PERIOD,...",
    )
    level_rate_exponent: float = setting(
        0.0,
        help="A level's learning rate is multiplied by PERIOD^this.",
        panel=OPTIMISATION,
        at_least=-MOST_EXPONENT,
        at_most=MOST_EXPONENT,
    )
    precision: str = setting(
        "float32", help="float32, or bf16 for autocast.", panel=OPTIMISATION, choices=("float32", "bf16")
    )
    matmul_precision: str = setting(
        "highest",
        help="Of float32 products, in memories too: highest, high (TF32) or medium (bfloat16).",
        panel=OPTIMISATION,
        choices=("highest", "high", "medium"),
    )
    gradient_checkpointing: bool = setting(False, help="Less memory for more computation.", panel=OPTIMISATION)
    device: str = setting("auto", help="auto or cpu.", panel=OPTIMISATION, choices=("auto", "cpu"))
    seed: int = setting(0, help="Of the weights and the data order.", panel=OPTIMISATION)

    log_every: int = setting(10, help="Steps between two records.", panel=RECORDS, at_least=1)
    eval_every: int = setting(100, help="Steps between two validations.", panel=RECORDS, at_least=1)
    save_every: int = setting(100, help="Steps between two checkpoints.", panel=RECORDS, at_least=1)
    keep_checkpoints: int = setting(2, help="Newest checkpoints kept.", panel=RECORDS, at_least=1)
    eval_tokens: int = setting(65536, help="Most tokens a validation reads.", panel=RECORDS, at_least=2)
    tensorboard: bool = setting(True, help="Write TensorBoard events.", panel=RECORDS)
    measure_levels: bool = setting(False, help="Measure updates and gradients of the levels as well.", panel=RECORDS)
    sample_tokens: int = setting(200, help="Length of the sample at the end.", panel=RECORDS, at_least=0)
    sample_prompt: str = setting("", help="Beginning of the sample.", panel=RECORDS)

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant.

        Raises:
            UserError: the setting, its value and what is allowed.
        """
        check(self, UserError)
        if self.levels:
            parse_levels(self.levels)
        elif self.level_rate_exponent and self.init is None:
            raise UserError("--level-rate-exponent has no effect without --levels; add it, or leave the exponent out")
        if self.init is not None:
            self._check_init()
        if self.steps is not None and self.tokens is not None:
            raise UserError("both --steps and --tokens are given; the budget is one or the other")
        if self.streaming and len(self.data) != 1:
            raise UserError("--streaming needs exactly one --data NAME, a set of the Hugging Face hub")
        if self.carry_tokens is not None and not self.carry_state:
            raise UserError("--carry-tokens has no effect without --carry-state; add it, or leave --carry-tokens out")
        if self.carry_tokens is not None and self.carry_tokens % self.sequence_length:
            raise UserError(
                f"--carry-tokens {self.carry_tokens} is no multiple of the sequence length {self.sequence_length}"
            )

    def _check_init(self) -> None:
        for option, name in (("--preset", "preset"), ("--size", "size"), ("--set", "overrides")):
            if getattr(self, name) != getattr(TrainConfig(out=self.out), name):
                raise UserError(f"--init brings its own architecture; leave {option} out, or --init")
        if self.tokenizer != "bytes":
            raise UserError("--init brings its own tokenizer; leave --tokenizer out, or --init")

    def resolved(self, processes: int = 1) -> Self:
        """The same run with every default that depends on other settings filled in; idempotent.

        Args:
            processes: data-parallel processes, each with `batch_size` rows.
        """
        steps = self.steps
        if steps is None and self.tokens is None:
            steps = 500
        elif steps is None:
            assert self.tokens is not None
            steps = math.ceil(self.tokens / self.tokens_per_step(processes))
        rate = self.learning_rate
        if rate is None:
            rate = 1e-4 if self.init else 3e-3 if self.size == "tiny" else 4e-4
            rate = rate if self.optimizer in LIKE_ADAMW else 0.1
        warmup = min(2000, steps // 10) if self.warmup_steps is None else self.warmup_steps
        return replace(self, steps=steps, tokens=None, learning_rate=rate, warmup_steps=warmup)

    def tokens_per_step(self, processes: int = 1) -> int:
        """Tokens an optimizer step is made of."""
        return self.batch_size * self.gradient_accumulation * self.sequence_length * processes

    def row_tokens_per_step(self) -> int:
        """Tokens that one row reads between two optimizer steps: a carried state goes through all batches of a step."""
        return self.sequence_length * (self.gradient_accumulation if self.carry_state else 1)

    def restart(self) -> int | None:
        """Tokens after which a row's memories start anew; None: with its stream."""
        return self.carry_tokens if self.carry_state else self.sequence_length

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        return values | {"data": list(self.data), "valid": list(self.valid)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            UserError: settings this release does not know.
        """
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise UserError(f"the saved run has settings this release does not know: {', '.join(unknown)}")
        return cls(**values | {"data": tuple(values.get("data", ())), "valid": tuple(values.get("valid", ()))})


def differences(saved: TrainConfig, wanted: TrainConfig) -> list[str]:
    """Settings, as `name: saved -> wanted`, that would make the resumed run another run."""
    before, after = saved.to_dict(), wanted.to_dict()
    return [
        f"{name}: {before[name]} -> {after[name]}"
        for name in before
        if name not in FREE_ON_RESUME and before[name] != after[name]
    ]


def read_run(out: str | Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings and the data record of the run in `out`.

    Raises:
        UserError: there is no run in `out`, or its record is damaged.
    """
    record = _read_record(out)
    try:
        return TrainConfig.from_dict(record["config"]), dict(record["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(out, error) from error


def begun_with(out: str | Path, checkpoint: Path | None) -> int:
    """The number of processes the run in `out` began with.

    Version 0.1 did not record it, and could not change it: its newest checkpoint holds a file for each process.

    Raises:
        UserError: as `read_run`.
    """
    known = _read_record(out).get("processes")
    if known is None:
        if checkpoint is None:
            return process_count()  # nothing has been trained: it begins anew, as it is started now
        return max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    if not isinstance(known, int) or known < 1:
        raise _damaged(out, f"it names {known!r} processes")
    return known


def _read_record(out: str | Path) -> dict[str, Any]:
    file = Path(out) / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"no run to resume in {out} (it has no {CONFIG_FILE}); start one without --resume")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise _damaged(out, error) from error


def _damaged(out: str | Path, why: object) -> UserError:
    return UserError(f"{Path(out) / CONFIG_FILE} is damaged ({why}); start a new run in another directory")
