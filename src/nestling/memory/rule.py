"""The learning rule of a memory: what its fast weights minimise, and how they move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Objective = Literal["l2", "dot", "lp", "huber"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How fast weights learn (the equation in `ops.reference`).

    Attributes:
        objective: inner loss of output y against target v. "l2" is 1/2 |y - v|^2 (NL section 8.1), "dot" is -<y, v>
            (NL Eq. 92), "lp" is 1/p |y - v|_p^p and "huber" is the Huber loss, both per coordinate (Miras).
        gradient: "chunk" takes every gradient at the chunk's first weights (NL Eq. 90); "online" takes the output
            weight's at the token before, exactly.
        erase: delta gradient descent, the projection (I - e x x^T) (NL Eq. 56, 88).
        momentum: a surprise S that accumulates gradients (Titans Eq. 10).
        read: "token" reads the fast weights of the token itself; "chunk" those of the chunk's start (NL Eq. 90 to the
            letter), with which the last tokens are invisible.
        read_before: with read="token", read W_{t-1} in place of W_t (the time index of NL Eq. 86).
        p: exponent of "lp"; above 1, for a continuous gradient.
        delta: width of the quadratic part of "huber".
        clip: bound on every coordinate of a gradient (of a target, for "online"). Keys have length 1, so ordinary
            values stay far below the default 2; it keeps the fast weights bounded on hostile input.

    Raises:
        ValueError: a combination that has no meaning or no closed form; the message says why.
    """

    objective: Objective = "l2"
    gradient: Literal["chunk", "online"] = "chunk"
    erase: bool = True
    momentum: bool = False
    read: Literal["token", "chunk"] = "token"
    read_before: bool = False
    p: float = 3.0
    delta: float = 1.0
    clip: float = 2.0

    def __post_init__(self) -> None:
        _one_of("objective", self.objective, ("l2", "dot", "lp", "huber"))
        _one_of("gradient", self.gradient, ("chunk", "online"))
        _one_of("read", self.read, ("token", "chunk"))
        if self.gradient == "online" and self.objective not in ("l2", "dot"):
            raise ValueError(
                f"gradient='online' needs objective 'l2' or 'dot': the gradient of {self.objective!r} is not linear in "
                "the fast weights, so a chunk has no closed form; use gradient='chunk'"
            )
        if self.read == "chunk" and self.read_before:
            raise ValueError(
                "read='chunk' reads the weights before all writes of the chunk; read_before has no meaning there"
            )
        if self.objective == "lp" and self.p <= 1:
            raise ValueError(f"objective='lp' needs p > 1 for a continuous gradient, not {self.p}")
        for name in ("delta", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    @property
    def online(self) -> bool:
        """Whether gradients follow the weights token by token; those of "dot" do not depend on the weights."""
        return self.gradient == "online" and self.objective == "l2"


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}, not {value!r}")
