"""Settings of a `Learner`. All of them are plain values, so that a memory can hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch.optim import Optimizer

from nestling.optim import NAMES

Factory = Callable[[list[Any]], Optimizer]

MOST_EXPONENT = 8.0
"""Of a rate that follows the period: far beyond any use, and no float's limit."""
LARGEST = 2**63 - 1
"""Of a whole number: what a tensor, a `deque` and a generator's seed can take."""


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
    """

    period: int
    parameters: tuple[str, ...]
    lr: float | None = None
    optimizer: str | Factory | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a period, rank or rate that cannot be, or no parameters."""
        _whole("period", self.period, "a number of tokens")
        given: Any = self.parameters
        if isinstance(given, str) or not given or not all(isinstance(name, str) for name in given):
            raise ValueError(f"parameters of a level are a tuple of names or patterns, not {self.parameters!r}")
        if self.rank is not None:
            _whole("rank", self.rank, "a whole number")
        if self.lr is not None:
            _rate("lr", self.lr)
        if self.optimizer is not None:
            _optimizer(self.optimizer)


@dataclass(frozen=True)
class UpdateLimit:
    """The longest step of a level, in the Frobenius norm over all its parameters.

    Attributes:
        relative: fraction of the norm of what the level learns before the step.
        absolute: norm. With both the smaller counts.
    """

    relative: float | None = None
    absolute: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a limit that is not positive, or none."""
        if self.relative is None and self.absolute is None:
            raise ValueError("an UpdateLimit has a relative or an absolute limit, or both")
        for name in ("relative", "absolute"):
            if (value := getattr(self, name)) is not None:
                _within(name, value, 0.0, open_start=True)


@dataclass(frozen=True)
class Gate:
    """Learn from what is surprising enough only; everything is scored.

    Attributes:
        by: "token" leaves single tokens out of the loss, "chunk" leaves whole chunks unlearned.
        quantile: learn from losses above this quantile of the last `window` ones (of tokens, or of chunk means).
        threshold: learn from losses above it, nats. With both, above the larger.
        window: losses remembered.
    """

    by: Literal["token", "chunk"] = "token"
    quantile: float | None = None
    threshold: float | None = None
    window: int = 4096

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range."""
        if self.by not in ("token", "chunk"):
            raise ValueError(f'by is "token" or "chunk", not {self.by!r}')
        if self.quantile is None and self.threshold is None:
            raise ValueError("a Gate has a quantile or a threshold, or both")
        if self.quantile is not None:
            _within("quantile", self.quantile, 0.0, 1.0)
        if self.threshold is not None:
            _within("threshold", self.threshold, -math.inf)
        _whole("window", self.window, "a number of losses")


@dataclass(frozen=True)
class Replay:
    """Earlier pieces learned again with every chunk.

    Attributes:
        capacity: pieces kept, a uniform sample of all learned from (`Reservoir`).
        pieces: replayed with every chunk.
        weight: of their mean loss beside the chunk's.
        projection: where a level's gradient of the chunk would raise the replayed loss, take that component out
            (A-GEM, arXiv:1812.00420, level by level); with `weight` 0 the replayed gradient does nothing else.
            Their gradients are taken apart, two backward passes for one.
        teacher: what the loss of a replayed piece is. None: cross-entropy of its own tokens, which are learned by heart
            as they come again. "average": KL(p || q) to what the running mean of the weights says (`Options.average`),
            so that the slow weights teach the fast ones what they knew of the text and no token of it.
    """

    capacity: int = 256
    pieces: int = 1
    weight: float = 1.0
    projection: bool = False
    teacher: Literal["average"] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range."""
        _whole("capacity", self.capacity, "a number of pieces")
        _whole("pieces", self.pieces, "a number of pieces")
        _within("weight", self.weight, 0.0)
        _flag("projection", self.projection)
        if self.teacher not in (None, "average"):
            raise ValueError(f'teacher is None or "average", not {_shown(self.teacher)}')


@dataclass(frozen=True)
class Rehearsal:
    """What the model knew before, kept by text of its own (pseudo-rehearsal, Robins 1995): before it learns, it writes
    some, and with every chunk KL(base || model) on one piece is added to the loss. No text of anybody's is stored.

    Attributes:
        pieces: written, by plain sampling, since they stand for all that the model knows.
        length: tokens of each, at most the learner's context; None is half of that.
        weight: of the piece's mean divergence beside the chunk's mean loss.
    """

    pieces: int = 64
    length: int | None = None
    weight: float = 0.3

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range."""
        _whole("pieces", self.pieces, "a number of pieces")
        if self.length is not None:
            _whole("length", self.length, "a number of tokens", least=2)
        _within("weight", self.weight, 0.0)


@dataclass(frozen=True)
class Options:
    """What a `Learner` does beside Eq. 71.

    Attributes:
        piece: tokens that are read together at most; None is half of `context`. Every token sees at least `context -
            piece` earlier ones of its document, where there are so many. A smaller piece sees more and costs more:
            every piece is a forward pass over up to `context` tokens.
        batch_tokens: tokens of one forward pass over several pieces, padding included. A matter of memory and speed
            (4 bytes times the vocabulary for each, about three times with gradients).
        rank: of levels that name none.
        retention: the kept fraction of a level's difference to its pre-trained state, at each of its updates
            (L2-SP, arXiv:1802.01483, decoupled as AdamW's decay is): one for all levels, or by name. 1 forgets nothing.
        limit: longest step, for all levels or by name.
        gate: surprise gate.
        replay: replay buffer.
        rehearsal: of what the model knew before.
        average: keep a running mean of the weights (of low-rank levels, of their factors) beside them, over so many
            tokens, a chunk or more; see `Average`. It can teach (`Replay.teacher`), and `Learner.averaged` puts it on
            the model. Everything else is done with the weights themselves, which are quicker to adapt.
        bfloat16: run the forward pass under autocast; weights, gradients and optimizer states stay float32.
        betas: of the named optimizers, see `nestling.optim.build`.
        spike: a chunk whose mean loss exceeds this many times the running mean of the chunks', and that of a guess
            among all tokens, is not learned from; None learns from all that is finite.
        patience: after so many such chunks on end the stream has changed, and the running mean starts anew.
        seed: of the low-rank factors' first values, the replay buffer and the rehearsed text; 0 or more with these two.
    """

    piece: int | None = None
    batch_tokens: int = 2048
    rank: int | None = None
    retention: float | Mapping[str, float] = 1.0
    limit: UpdateLimit | Mapping[str, UpdateLimit] | None = None
    gate: Gate | None = None
    replay: Replay | None = None
    rehearsal: Rehearsal | None = None
    average: int | None = None
    bfloat16: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    spike: float | None = 10.0
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range."""
        if self.piece is not None:
            _whole("piece", self.piece, "a number of tokens")
        _whole("batch_tokens", self.batch_tokens, "a number of tokens")
        if self.rank is not None:
            _whole("rank", self.rank, "a whole number")
        values = self.retention.values() if isinstance(self.retention, Mapping) else (self.retention,)
        for value in values:
            _within("retention", value, 0.0, 1.0)
        if self.average is not None:
            _whole("average", self.average, "a number of tokens")
        if self.replay is not None and self.replay.teacher is not None and self.average is None:
            raise ValueError('a replay with teacher="average" needs the running mean: give average as well')
        if self.spike is not None:
            _within("spike", self.spike, 1.0)
        _whole("patience", self.patience, "a number of chunks")
        drawn = self.replay is not None or self.rehearsal is not None
        _whole("seed", self.seed, "a whole number", least=0 if drawn else -LARGEST)
        _flag("bfloat16", self.bfloat16)
        given: Any = self.betas
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise ValueError(f"betas are two numbers, not {self.betas!r}")
        for value in self.betas:
            _within("a beta", value, 0.0, 1.0, open_end=True)

    def check_levels(self, names: list[str], chunk: int, context: int) -> None:
        """Raises ValueError for a retention or limit of a level that does not exist, an average below a chunk, or a
        rehearsal beyond the context."""
        if self.rehearsal is not None and (self.rehearsal.length or 0) > context:
            raise ValueError(f"rehearsed pieces of {self.rehearsal.length} tokens do not fit a context of {context}")
        if self.average is not None and self.average < chunk:
            raise ValueError(f"average is {chunk} tokens or more, the fastest level's period, not {self.average}")
        for option in ("retention", "limit"):
            value = getattr(self, option)
            if isinstance(value, Mapping) and (unknown := sorted(set(value) - set(names))):
                raise ValueError(f"{option} names {', '.join(unknown)}; the levels are {', '.join(names)}")

    def retention_of(self, level: str) -> float:
        """The kept fraction of one level."""
        return self.retention.get(level, 1.0) if isinstance(self.retention, Mapping) else self.retention

    def limit_of(self, level: str) -> UpdateLimit | None:
        """The limit of one level."""
        return self.limit.get(level) if isinstance(self.limit, Mapping) else self.limit


@dataclass(frozen=True)
class Settings:
    """Everything a `Learner` is made from but the model: what a memory keeps to make it again.

    Attributes:
        levels: by name, with every parameter by its name.
        lr, rate_exponent, optimizer, context, options: as the learner's.
    """

    levels: dict[str, Level]
    optimizer: str | Factory
    lr: float
    rate_exponent: float
    context: int
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range."""
        _rate("lr", self.lr)
        _within("rate_exponent", self.rate_exponent, -MOST_EXPONENT, MOST_EXPONENT)
        _whole("context", self.context, "a number of tokens")
        _optimizer(self.optimizer)

    def values(self) -> dict[str, Any]:
        """JSON values; an optimizer that was given as a function is left out."""
        found = asdict(self)
        for owner in (found, *found["levels"].values()):
            if callable(owner["optimizer"]):
                owner["optimizer"] = None
                found["functions"] = True
        return found


def settings_from(values: Mapping[str, Any]) -> Settings:
    """The settings whose `values` these are.

    Raises:
        ValueError: an optimizer was given as a function, or a value is missing, unknown or out of range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"a learner's settings are values by name, in this memory {_shown(values)}")
    values = dict(values)
    if values.pop("functions", False):
        raise ValueError(
            "an optimizer of this memory's learner was made by a function, which a memory cannot hold; make the "
            "Learner as it was made then and call its load"
        )
    try:
        levels = {n: Level(**{**v, "parameters": tuple(v["parameters"])}) for n, v in values.pop("levels").items()}
        options = dict(values.pop("options"))
        options["betas"] = tuple(options["betas"])
        options["gate"] = None if options["gate"] is None else Gate(**options["gate"])
        options["replay"] = None if options["replay"] is None else Replay(**options["replay"])
        rehearsal = options.get("rehearsal")  # memories of earlier versions have none
        options["rehearsal"] = None if rehearsal is None else Rehearsal(**rehearsal)
        options["limit"] = _limits(options["limit"])
        return Settings(levels=levels, options=Options(**options), **values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the learner's settings in this memory cannot be read: {error}") from error


def _limits(value: Any) -> UpdateLimit | dict[str, UpdateLimit] | None:
    if value is None:
        return None
    if set(value) == {"relative", "absolute"} and not isinstance(value["relative"], Mapping):
        return UpdateLimit(**value)
    return {name: UpdateLimit(**limit) for name, limit in value.items()}


def _whole(name: str, value: object, what: str, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise ValueError(f"{name} is {what}, {least} or more, not {_shown(value)}")


def _within(
    name: str,
    value: float,
    low: float,
    high: float = math.inf,
    *,
    open_start: bool = False,
    open_end: bool = False,
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} is a number in [{low}, {high}], not {_shown(value)}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{name} is a number of a sensible size, not {_shown(value)}")
    if open_start and value == low:
        raise ValueError(f"{name} is larger than {low}, not {value!r}")
    if open_end and value == high:
        raise ValueError(f"{name} is smaller than {high}, not {value!r}")


def _rate(name: str, value: float) -> None:
    _within(name, value, 0.0, math.inf, open_end=True)


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is True or False, not {_shown(value)}")


def _optimizer(value: object) -> None:
    if not callable(value) and value not in NAMES:
        raise ValueError(f"unknown optimizer {_shown(value)}; choose one of: {', '.join(NAMES)}")


def _shown(value: object) -> str:
    """A value for an error message, however long it is."""
    text = repr(value) if not isinstance(value, int) or abs(value) <= LARGEST else "a number of more than 64 bits"
    return text if len(text) <= 80 else text[:77] + "..."
