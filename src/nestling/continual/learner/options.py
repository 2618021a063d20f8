"""Settings of a `Learner`. All of them are plain values, so that a memory can hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from torch.optim import Optimizer

from nestling.continual.component import LEARNING, component_field, components_of
from nestling.continual.learner.average import RunningMean
from nestling.continual.learner.gate import Gate, SurpriseGate
from nestling.continual.learner.limit import StepLimit, UpdateLimit
from nestling.continual.replay.buffer import Replay, ReplayBuffer
from nestling.continual.replay.rehearsal import Rehearsal, RehearsedText
from nestling.optim import NAMES
from nestling.settings import MOST_EXPONENT, NO_FLAG, check, kinds_of, setting, shown

__all__ = ["Factory", "Gate", "Level", "Options", "Rehearsal", "Replay", "Settings", "UpdateLimit", "settings_from"]

Factory = Callable[[list[Any]], Optimizer]


@dataclass(frozen=True)
class Level:
    """Parameters that learn together.

    Attributes:
        period: tokens between two updates.
        parameters: names of parameters or patterns of them (`"*.mlp.*"`), where `*` stands for any text.
        lr: None is the learner's lr * (period / fastest period)^rate_exponent.
        optimizer: a name of `nestling.optim.NAMES`, or what makes an optimizer from a list of parameters (its rate is
            then its own, and a memory cannot name it); None is the learner's.
        rank: learn differences of this rank on weights of `nn.Linear` layers, and leave the weights as they are. None
            learns the weights themselves.
        signal_to_noise: update when the mean gradient since the last update has this ratio (1 is the gradient noise
            scale, see `nestling.optim.noise_scale`), after two of the learner's chunks at least and `period` tokens at
            most. None takes the options'.
    """

    period: int = setting(help="Tokens between two updates.", at_least=1)
    parameters: tuple[str, ...] = setting(help="Names of parameters, or patterns of them.")
    lr: float | None = setting(None, help="Learning rate.", at_least=0, below=math.inf)
    optimizer: str | Factory | None = None
    rank: int | None = setting(None, help="Rank of the differences learned.", at_least=1)
    signal_to_noise: float | None = setting(
        None, help="Signal-to-noise ratio at which it is updated.", above=0, below=math.inf
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a period, rank or rate that cannot be, or no parameters."""
        given: Any = self.parameters
        if isinstance(given, str) or not given or not all(isinstance(name, str) for name in given):
            raise ValueError(f"parameters of a level are a tuple of names or patterns, not {self.parameters!r}")
        check(self)
        if self.optimizer is not None:
            _optimizer(self.optimizer)


@dataclass(frozen=True)
class Options:
    """What a `Learner` does beside Eq. 71.

    An option that does something around a chunk is a `LearnerComponent`, named beside its field; see there how to add
    one.

    Attributes:
        piece: tokens that are read together at most; None is half of `context`. Every token sees at least `context -
            piece` earlier ones of its document, where there are so many. A smaller piece sees more and costs more:
            every piece is a forward pass over up to `context` tokens.
        batch_tokens: tokens of one forward pass over several pieces, padding included. A matter of memory and speed
            (4 bytes times the vocabulary for each, about three times with gradients).
        rank: of levels that name none.
        signal_to_noise: of levels that name none; None updates every level by its period.
        chunk: tokens of a chunk, of which every period is a multiple; None is the fastest level's period. A chunk gives
            one gradient: of several before an update it is told whether they agree.
        retention: the kept fraction of a level's difference to its pre-trained state, at each of its updates
            (L2-SP, arXiv:1802.01483, decoupled as AdamW's decay is): one for all levels, or by name. 1 forgets nothing.
        limit: longest step, for all levels or by name.
        gate: surprise gate.
        replay: replay buffer.
        rehearsal: of what the model knew before.
        average: keep a running mean of the weights (of low-rank levels, of their factors) beside them, over so many
            tokens, a chunk or more; see `RunningMean`. It can teach (`Replay.teacher`), and `Learner.averaged` puts it
            on the model. Everything else is done with the weights themselves, which are quicker to adapt.
        bfloat16: run the forward pass under autocast; weights, gradients and optimizer states stay float32.
        betas: of the named optimizers, see `nestling.optim.build`.
        spike: a chunk whose mean loss exceeds this many times the running mean of the chunks', and that of a guess
            among all tokens, is not learned from; None learns from all that is finite.
        patience: after so many such chunks on end the stream has changed, and the running mean starts anew.
        seed: of the low-rank factors' first values, the replay buffer and the rehearsed text; 0 or more with these two.
    """

    piece: int | None = setting(None, help="Tokens that are read together.", flag=NO_FLAG, at_least=1)
    batch_tokens: int = setting(2048, help="Tokens of one forward pass.", flag=NO_FLAG, at_least=1)
    rank: int | None = setting(
        None, help="Learn differences of this rank, for a small memory.", flag="rank", panel=LEARNING, at_least=1
    )
    signal_to_noise: float | None = setting(
        None,
        help="Update a level as soon as its mean gradient has this signal-to-noise ratio, its period being the longest "
        "wait; 1 is the gradient noise scale. Needs --chunk.",
        flag="signal-to-noise",
        panel=LEARNING,
        above=0,
        below=math.inf,
    )
    chunk: int | None = setting(
        None, help="Tokens of one gradient. Default: the fastest period.", flag="chunk", panel=LEARNING, at_least=1
    )
    retention: float | Mapping[str, float] = setting(
        1.0,
        help="Kept part of the difference to the base at each update; 1 keeps all.",
        flag="retention",
        panel=LEARNING,
        at_least=0,
        at_most=1,
    )
    limit: UpdateLimit | Mapping[str, UpdateLimit] | None = component_field(
        StepLimit, setting(None, help="Longest step.", flag=NO_FLAG)
    )
    gate: Gate | None = component_field(SurpriseGate, setting(None, help="Surprise gate.", flag=NO_FLAG))
    replay: Replay | None = component_field(ReplayBuffer, setting(None, help="Replay buffer."))
    rehearsal: Rehearsal | None = component_field(RehearsedText, setting(None, help="Rehearsal."))
    average: int | None = component_field(
        RunningMean,
        setting(
            None,
            help="What is replayed is taught by the running mean of the weights over so many tokens.",
            flag="teacher",
            metavar="TOKENS",
            panel=LEARNING,
            at_least=1,
        ),
    )
    bfloat16: bool = setting(False, help="Forward pass in bfloat16; weights stay float32.", flag="bf16", panel=LEARNING)
    betas: tuple[float, float] = (0.9, 0.95)
    spike: float | None = setting(10.0, help="Losses so many times the mean are spikes.", flag=NO_FLAG, at_least=1)
    patience: int = setting(3, help="Spikes after which the stream has changed.", flag=NO_FLAG, at_least=1)
    seed: int = setting(0, help="Of ranks, replay and rehearsal.", flag="seed", panel=LEARNING)

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range."""
        check(self)
        for value in self.retention.values() if isinstance(self.retention, Mapping) else ():
            _fraction("retention", value)
        for limit in self.limit.values() if isinstance(self.limit, Mapping) else ():
            if not isinstance(limit, UpdateLimit):
                raise ValueError(f"limit is an UpdateLimit, or one by level, not {shown(limit)}")
        if self.replay is not None and self.replay.teacher is not None and self.average is None:
            raise ValueError('a replay with teacher="average" needs the running mean: give average as well')
        drawing = [name for name, (kind, _) in components_of(self).items() if kind.draws]
        if self.seed < 0 and drawing:
            raise ValueError(f"seed is {self.seed}, but must be 0 or more with {' and '.join(drawing)}")
        given: Any = self.betas
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise ValueError(f"betas are two numbers, not {self.betas!r}")
        for value in self.betas:
            _fraction("a beta", value)
            if value == 1:
                raise ValueError("a beta is smaller than 1")

    def retention_of(self, level: str) -> float:
        """The kept fraction of one level."""
        return self.retention.get(level, 1.0) if isinstance(self.retention, Mapping) else self.retention


@dataclass(frozen=True)
class Settings:
    """Everything a `Learner` is made from but the model: what a memory keeps to make it again.

    Attributes:
        levels: by name, with every parameter by its name.
        optimizer, lr, rate_exponent, context, options: as the learner's.
    """

    levels: dict[str, Level] = setting(
        None,
        help="Tokens between two updates: of the model's own levels, or of patterns of parameter names as in "
        "`*.mlp.*=256`. Default: the model's levels; all MLPs every 256 tokens where it has none.",
        flag="levels",
        takes=str,
        metavar="NAME=PERIOD,...",
        panel=LEARNING,
    )
    optimizer: str | Factory = setting(
        "adamw", help="As in nestling train.", flag="optimizer", metavar="NAME", panel=LEARNING
    )
    lr: float = setting(
        1e-4, help="Learning rate of the fastest level.", flag="lr", panel=LEARNING, at_least=0, below=math.inf
    )
    rate_exponent: float = setting(
        -0.5,
        help="A slower level's rate is multiplied by (its period / fastest)^this.",
        flag="rate-exponent",
        panel=LEARNING,
        at_least=-MOST_EXPONENT,
        at_most=MOST_EXPONENT,
    )
    context: int = setting(512, help="Tokens read together at most.", flag="context", panel=LEARNING, at_least=1)
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range."""
        check(self)
        _optimizer(self.optimizer)
        names = self.options.retention if isinstance(self.options.retention, Mapping) else {}
        if unknown := sorted(set(names) - set(self.levels)):
            raise ValueError(f"retention names {', '.join(unknown)}; the levels are {', '.join(self.levels)}")
        for name, level in self.levels.items():
            if level.period % self.chunk:
                raise ValueError(f"the period of level {name!r}, {level.period} tokens, is no multiple of the chunk, "
                                 f"{self.chunk}")  # fmt: skip
            if (level.signal_to_noise or self.options.signal_to_noise) and level.period < 2 * self.chunk:
                raise ValueError(
                    f"level {name!r} is updated by its signal-to-noise ratio, which takes two gradients or more before "
                    f"its longest wait of {level.period} tokens: give a chunk of {level.period // 2} tokens or fewer"
                )

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.options.chunk or min(level.period for level in self.levels.values())

    def values(self) -> dict[str, Any]:
        """JSON values; an optimizer that was given as a function is left out."""
        found = asdict(self)
        for owner in (found, *found["levels"].values()):
            if callable(owner["optimizer"]):
                owner["optimizer"] = None
                found["functions"] = True
        return found


def settings_from(values: Mapping[str, Any]) -> Settings:
    """The settings whose `values` these are. A setting that is missing has its default: earlier versions had fewer.

    Raises:
        ValueError: an optimizer was given as a function, or a value is missing, unknown or out of range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"a learner's settings are values by name, in this memory {shown(values)}")
    values = dict(values)
    if values.pop("functions", False):
        raise ValueError(
            "an optimizer of this memory's learner was made by a function, which a memory cannot hold; make the "
            "Learner as it was made then and call its load"
        )
    try:
        if missing := [name for name in ("levels", "optimizer", "lr", "context", "options") if name not in values]:
            raise ValueError(f"the learner's settings in this memory lack {', '.join(missing)}")
        made: Settings = _decoded(Settings, values)
        return made
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the learner's settings in this memory cannot be read: {error}") from error


def _decoded(hint: Any, value: Any) -> Any:
    """A value of this type from JSON values: dataclasses and mappings from dictionaries, tuples from lists."""
    kinds = list(kinds_of(hint))
    if isinstance(value, Mapping):
        owner = next((k for k in kinds if isinstance(k, type) and is_dataclass(k)), None)
        mapping = next((k for k in kinds if get_origin(k) in (dict, Mapping)), None)
        by_name = any(isinstance(each, Mapping) for each in value.values())
        if owner is not None and (mapping is None or not by_name):
            hints = get_type_hints(owner)
            return owner(**{name: _decoded(hints[name], each) for name, each in value.items()})
        if mapping is not None:
            return {name: _decoded(get_args(mapping)[1], each) for name, each in value.items()}
    if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    return value


def _fraction(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} is a number in [0, 1], not {shown(value)}")


def _optimizer(value: object) -> None:
    if not callable(value) and value not in NAMES:
        raise ValueError(f"unknown optimizer {shown(value)}; choose one of: {', '.join(NAMES)}")
