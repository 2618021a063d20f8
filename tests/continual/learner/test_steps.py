from __future__ import annotations

import pytest
import torch

from nestling.continual.learner.options import Gate, Level, Options, Replay, Settings, UpdateLimit, settings_from
from nestling.continual.learner.steps import dot, limit_step, norm, project, retain


def lists(seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]


def test_retention_is_gradient_descent_on_the_pull() -> None:
    """kept = 1 - lr * strength, on strength / 2 |W - W_0|^2."""
    w, base, lr, strength = lists(1), lists(2), 0.1, 0.7
    leaves = [x.clone().requires_grad_() for x in w]
    (0.5 * strength * sum(((x - b) ** 2).sum() for x, b in zip(leaves, base, strict=True))).backward()
    retain(list(zip(w, base, strict=True)), 1 - lr * strength)
    for x, leaf in zip(w, leaves, strict=True):
        torch.testing.assert_close(x, leaf.detach() - lr * leaf.grad)


@pytest.mark.parametrize(
    ("limit", "length"),
    [
        (UpdateLimit(absolute=0.5), 0.5),
        (UpdateLimit(relative=0.1), None),
        (UpdateLimit(relative=0.1, absolute=1e-3), 1e-3),
        (UpdateLimit(absolute=1e6), 0),
    ],
)
def test_limit_keeps_the_direction_and_shortens_the_step(limit: UpdateLimit, length: float | None) -> None:
    w, before = lists(1), lists(2)
    steps = [a - b for a, b in zip(w, before, strict=True)]
    factor = limit_step(w, before, limit.longest(norm(before)))
    if length is None:
        length = 0.1 * norm(before)
    assert factor == pytest.approx(length / norm(steps) if length else 1.0)
    for new, old, step in zip(w, before, steps, strict=True):
        torch.testing.assert_close(new - old, factor * step)


def test_projection_never_points_against_the_replayed_gradient() -> None:
    for seed in range(6):
        g, r = lists(seed), lists(seed + 50)
        was, old = dot(g, r), [x.clone() for x in g]
        taken = project(g, r)
        if was >= 0:
            assert taken == 0 and all(torch.equal(a, b) for a, b in zip(g, old, strict=True))
            continue
        assert dot(g, r) == pytest.approx(0, abs=1e-12)
        assert taken == pytest.approx(was / dot(r, r))
        moved = [a - b for a, b in zip(g, old, strict=True)]
        assert norm(moved) == pytest.approx(abs(was) / norm(r)), "the smallest change that does it"
    assert project(lists(1), [torch.zeros_like(x) for x in lists(1)]) == 0


def test_norm_says_when_something_is_not_finite() -> None:
    assert norm([]) == 0
    assert not norm([torch.tensor([1.0, float("nan")])]) < float("inf")
    assert not norm([torch.tensor([1.0]), torch.tensor([float("inf")])]) < float("inf")


def test_settings_come_back_from_json() -> None:
    import json

    options = Options(
        retention={"a": 0.5},
        limit={"a": UpdateLimit(0.1)},
        gate=Gate(threshold=1.0),
        replay=Replay(),
        rank=3,
        spike=None,
    )
    for each in (options, Options(), Options(limit=UpdateLimit(absolute=2.0), retention=0.9)):
        settings = Settings({"a": Level(8, ("x", "y"), 0.1, "sgd", 2)}, "m3", 0.1, -0.5, 64, each)
        assert settings_from(json.loads(json.dumps(settings.values()))) == settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Level(0, ("x",)), "period"),
        (lambda: Level(True, ("x",)), "period"),
        (lambda: Level(8, ()), "tuple of names"),
        (lambda: Level(8, "x"), "tuple of names"),  # type: ignore[arg-type]
        (lambda: Level(8, ("x",), rank=0), "rank"),
        (lambda: Level(8, ("x",), lr=-1.0), "lr"),
        (UpdateLimit, "relative or an absolute"),
        (lambda: UpdateLimit(relative=0.0), "relative"),
        (Gate, "quantile or a threshold"),
        (lambda: Gate(quantile=1.5), "quantile"),
        (lambda: Gate(by="word", threshold=1.0), "by is"),  # type: ignore[arg-type]
        (lambda: Replay(capacity=0), "capacity"),
        (lambda: Replay(weight=-1.0), "weight"),
        (lambda: Options(retention=1.5), "retention"),
        (lambda: Options(retention={"a": -0.1}), "retention"),
        (lambda: Options(piece=0), "piece"),
        (lambda: Options(spike=0.5), "spike"),
        (lambda: Options(patience=0), "patience"),
        (lambda: Options(batch_tokens=0), "batch_tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
