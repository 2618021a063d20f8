"""Settings of the continuum memory in context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nestling.layers.heads import NEW_FIELD

Step = Literal["token", "spectral", "proximal"]
STEPS: tuple[Step, ...] = ("token", "spectral", "proximal")


@dataclass(frozen=True)
class LevelRule:
    """How one level learns; see `ContinuumConfig` for the fields."""

    step: Step
    momentum: bool
    retention: bool
    erase: bool


@dataclass(frozen=True, kw_only=True)
class ContinuumConfig:
    """Settings of `ContinuumMemory`.

    `step`, `momentum` and `retention` are one value for all levels, or a tuple with one a level (NL section 7.1: every
    level has an optimizer of its own).

    Attributes:
        hidden_size: width of input and output.
        intermediate_size: hidden width of every level's MLP.
        periods: update period of every level in tokens, in chain order; None never updates, a plain MLP.
        variant: "sequential" (Eq. 70, 73), "nested" (Eq. 72) or "headwise" (Eq. 74).
        target: what a level's fast weight learns to output (see `ContinuumMemory`): "next", "value" or
            "reconstruction".
        erase: delta gradient descent (NL Eq. 56): inside a period every write also erases what the weight holds at
            its key, at the rate of the write. A constant target is then recalled at half its size. For `step="token"`.
        inner_lr_scale: first value of the learnable rate of every level, in (0, 1).
        norm_eps: of the norms before every level.
        step: length of a period's update (see `layers.continuum_update`). "token" gives every token an equal share of
            the rate, so that an update moves the error of one token by rate / period. "spectral" divides by the largest
            eigenvalue of the period's keys, and moves the error that its tokens share by up to the rate. "proximal"
            solves for the weights that answer the period's tokens and stay near: every error moves.
        momentum: a level keeps a running surprise, with a learnable share of the past (first value 0.5).
        retention: what a level has learned decays towards its meta-learned weights, with every update, by a learnable
            share (first value 0.05).
        gain: what a level has learned enters its output through a learnable factor for every output feature, which
            starts at 0: a level that no training window has updated and read says what its meta-learned weights say.

    Raises:
        ValueError: no level, a size or a period below 1, nested periods that do not divide one another, an unknown
            variant, target or step, not one value a level, a rate outside (0, 1), or an erase with a step that it does
            not fit.
    """

    hidden_size: int
    intermediate_size: int
    periods: tuple[int | None, ...] = (64, 256, None)
    variant: Literal["sequential", "nested", "headwise"] = "sequential"
    target: Literal["next", "value", "reconstruction"] = "value"
    erase: bool = False
    inner_lr_scale: float = 0.5
    norm_eps: float = 1e-6
    step: Step | tuple[Step, ...] = field(default="token", metadata=NEW_FIELD)
    momentum: bool | tuple[bool, ...] = field(default=False, metadata=NEW_FIELD)
    retention: bool | tuple[bool, ...] = field(default=False, metadata=NEW_FIELD)
    gain: bool = field(default=False, metadata=NEW_FIELD)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        self._check_periods()
        _one_of("variant", self.variant, ("sequential", "nested", "headwise"))
        _one_of("target", self.target, ("next", "value", "reconstruction"))
        if not 0 < self.inner_lr_scale < 1:
            raise ValueError(f"inner_lr_scale is in (0, 1), not {self.inner_lr_scale}")
        for name, allowed in (("step", STEPS), ("momentum", (False, True)), ("retention", (False, True))):
            self._check_levels(name, allowed)
        if self.erase and any(self.rule(i).step != "token" for i in range(len(self.periods))):
            raise ValueError(
                f"erase=True goes with step='token' alone, not with {self.step!r}: a step over the whole period has no "
                "order of tokens to erase in"
            )

    def _check_periods(self) -> None:
        if not isinstance(self.periods, (tuple, list)):
            raise ValueError(f"periods is a tuple with one entry a level, for example (64, None), not {self.periods!r}")
        object.__setattr__(self, "periods", tuple(self.periods))
        if not self.periods:
            raise ValueError("periods is empty: there is at least one level, for example periods=(64, None)")
        if any(p is not None and (not isinstance(p, int) or p < 1) for p in self.periods):
            raise ValueError(f"periods are tokens >= 1, or None for a level that never updates; got {self.periods}")
        if self.variant == "nested":
            for fast, slow in zip(self.periods, self.periods[1:], strict=False):
                if slow is not None and (fast is None or slow % fast):
                    raise ValueError(
                        f"nested periods must rise by whole factors, fastest first; {slow} is no multiple of {fast}"
                    )

    def _check_levels(self, name: str, allowed: Sequence[Any]) -> None:
        """One value, or one a level."""
        value = getattr(self, name)
        if isinstance(value, (tuple, list)):
            object.__setattr__(self, name, tuple(value))
            if len(value) != len(self.periods):
                raise ValueError(
                    f"{name} has {len(value)} values for {len(self.periods)} levels; give one value for all, or one a "
                    "level"
                )
        for one in value if isinstance(value, (tuple, list)) else (value,):
            _one_of(name, one, allowed)

    def context(self, level: int) -> int | None:
        """Tokens after which a nested level is re-initialised: the period of the level above; None is never."""
        return self.periods[level + 1] if self.variant == "nested" and level + 1 < len(self.periods) else None

    def rule(self, level: int) -> LevelRule:
        """How a level learns."""
        own = {n: getattr(self, n) for n in ("step", "momentum", "retention")}
        return LevelRule(erase=self.erase, **{n: v[level] if isinstance(v, tuple) else v for n, v in own.items()})


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if type(value) not in {type(a) for a in allowed} or value not in allowed:
        listed = [repr(a) for a in allowed]
        raise ValueError(f"{name} is {', '.join(listed[:-1])} or {listed[-1]}, not {value!r}")
