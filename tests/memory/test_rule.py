"""Impossible rules are refused with a sentence that says why."""

from __future__ import annotations

from typing import Any

import pytest

from nestling.memory.rule import Rule

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"objective": "l1"}, "objective is one of 'l2', 'dot', 'lp', 'huber', not 'l1'"),
    ({"gradient": "token"}, "gradient is one of 'chunk', 'online', not 'token'"),
    ({"read": "after"}, "read is one of 'token', 'chunk', not 'after'"),
    ({"gradient": "online", "objective": "lp"}, "gradient of 'lp' is not linear in the fast weights"),
    ({"gradient": "online", "objective": "huber"}, "gradient of 'huber' is not linear in the fast weights"),
    ({"read": "chunk", "read_before": True}, "read_before has no meaning there"),
    ({"objective": "lp", "p": 1.0}, r"objective='lp' needs p > 1 for a continuous gradient, not 1.0"),
    ({"delta": 0.0}, "delta must be positive, not 0.0"),
    ({"clip": -1.0}, "clip must be positive, not -1.0"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(s) for s, _ in REFUSED])
def test_refuses_in_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient": "online"},
        {"gradient": "online", "momentum": True},
        {"gradient": "online", "objective": "dot", "erase": False},
        {"momentum": True, "read_before": True},
        {"read": "chunk", "momentum": True},
        {"objective": "lp", "p": 1.1},
    ],
    ids=str,
)
def test_accepts(settings: dict[str, Any]) -> None:
    rule = Rule(**settings)
    assert all(getattr(rule, name) == value for name, value in settings.items())


def test_a_rule_is_a_frozen_value() -> None:
    assert Rule(clip=1.0) == Rule(clip=1.0) != Rule()
    assert len({Rule(), Rule()}) == 1
    with pytest.raises(AttributeError):
        Rule().clip = 3.0  # type: ignore[misc]
