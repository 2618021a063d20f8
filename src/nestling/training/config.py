"""The settings of a training run, and their checks. They are saved in the run's directory as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from nestling.errors import UserError
from nestling.levels.assignment import parse_levels
from nestling.optim.build import LIKE_ADAMW, NAMES

CONFIG_FILE = "train_config.json"

# Settings that say what is written and shown, not what is computed; a resumed run may change them.
FREE_ON_RESUME = frozenset(
    {"out", "save_every", "keep_checkpoints", "tensorboard", "measure_levels", "sample_tokens", "sample_prompt"}
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The defaults train `hope` at size `tiny` on the embedded corpus, some minutes on a CPU.

    Model
        init: directory of a nestling model to go on training, with its own tokenizer, in place of a fresh `preset`.
            The levels of a converted model (`models.convert`) are updated at their own periods, each to the nearest
            whole number of optimizer steps; `levels` overrides them.

    Data
        data: files or directories of UTF-8 text, or with `streaming` one set of the hub. Empty: the embedded corpus.
        valid: text to validate on. Empty: the last tenth of each corpus, contiguous, is held out.
        tokenizer: `bytes`, `bpe:SIZE` (trained on the training part), or a Hugging Face tokenizer.

    Optimisation. AdamW with betas 0.9 and 0.95 (the choice of GPT-3 and most language models since), weight decay on
    matrices only, linear warm-up, cosine down to `min_lr_ratio` of the peak.
        optimizer: a name of `optim.build`.
        learning_rate: 3e-3 suits `tiny`; None takes it for `tiny` and 4e-4 (Titans, section 5.1) for larger sizes, 1e-4
            for a model of `init` (that of the first trials with a pre-trained one), and 0.1 for optimizers whose steps
            have a gradient's size.
        tokens: budget in tokens; with neither `tokens` nor `steps`, 500 steps.
        warmup_steps: None means a tenth of the run, at most 2000.
        carry_state: every batch row reads one contiguous stream and keeps its state, detached, from step to step
            (truncated backpropagation through time).
        carry_tokens: reset carried states after so many tokens; None at the end of a stream only. Models whose state
            grows with the text (full attention) need it.
        precision: `float32`, or `bf16` for autocast.

    Levels
        levels: update periods in optimizer steps, such as `cms.0=1,cms.1=8,cms.2=64` (`levels.assign_levels` says what
            may be named); everything else has period 1, and with an empty string there is one level. A slow level is
            updated with the sum of its gradients (NL Eq. 71), each clipped to `grad_clip` at its own step.
        level_rate_exponent: learning rates of a level are multiplied by period^this; see `MultiFrequency`.

    Records. Steps are optimizer steps throughout.
        log_every, eval_every, save_every: in steps; an evaluation and a checkpoint also come at the end.
        measure_levels: with every training record, measure the levels of `levels`, or without any the continuum's
            (`levels.measures`). Takes a copy of the first weights.
        eval_tokens: validation reads at most so many tokens, from the start of the held-out text.
    """

    out: str
    init: str | None = None
    preset: str = "hope"
    size: str = "tiny"
    overrides: dict[str, Any] = field(default_factory=dict)

    data: tuple[str, ...] = ()
    valid: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    streaming: bool = False
    subset: str | None = None
    split: str = "train"
    column: str = "text"

    sequence_length: int = 256
    batch_size: int = 8
    gradient_accumulation: int = 1
    steps: int | None = None
    tokens: int | None = None
    carry_state: bool = False
    carry_tokens: int | None = None

    optimizer: str = "adamw"
    learning_rate: float | None = None
    min_lr_ratio: float = 0.1
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    precision: str = "float32"
    levels: str = ""
    level_rate_exponent: float = 0.0
    gradient_checkpointing: bool = False
    device: str = "auto"
    seed: int = 0

    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    keep_checkpoints: int = 2
    eval_tokens: int = 65536
    tensorboard: bool = True
    measure_levels: bool = False
    sample_tokens: int = 200
    sample_prompt: str = ""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant.

        Raises:
            UserError: the setting, its value and what is allowed.
        """
        for name in ("sequence_length", "batch_size", "gradient_accumulation", "log_every", "eval_every", "save_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("steps", "tokens", "carry_tokens"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        _require(self.sequence_length >= 2, "sequence_length", self.sequence_length, "at least 2")
        _require(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, "at least 1")
        _require(self.eval_tokens >= 2, "eval_tokens", self.eval_tokens, "at least 2")
        _require(self.sample_tokens >= 0, "sample_tokens", self.sample_tokens, "at least 0")
        _require(self.warmup_steps is None or self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        _require(self.learning_rate is None or self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")
        _require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "between 0 and 1")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _require(self.grad_clip > 0, "grad_clip", self.grad_clip, "positive")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        _require(self.precision in ("float32", "bf16"), "precision", self.precision, "float32 or bf16")
        _require(self.device in ("auto", "cpu"), "device", self.device, "auto or cpu")
        _require(self.optimizer in NAMES, "optimizer", self.optimizer, f"one of {', '.join(NAMES)}")
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
    file = Path(out) / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"no run to resume in {out} (it has no {CONFIG_FILE}); start one without --resume")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return TrainConfig.from_dict(record["config"]), dict(record["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); start a new run in another directory") from error


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise UserError(f"{name} is {value}, but must be {allowed}")
