"""Grids that grow."""

from __future__ import annotations

import math

import pytest

from reproductions.harness.grid import best_rate, fixed, grow, grow_rate, next_rate, threes, times


@pytest.mark.parametrize(("best", "tried"), [(1e-4, 4), (2e-5, 5), (3e-6, 7), (3e-3, 6), (9.0, 10)])
def test_the_grid_grows_until_the_best_is_inside(best: float, tried: int) -> None:
    found = grow_rate(lambda rate: abs(math.log(rate / best)))
    assert len(found) == tried and list(found) == sorted(found)
    assert best_rate(found) == min(found, key=lambda rate: abs(math.log(rate / best)))
    assert best_rate(found) not in (min(found), max(found)) or best > 1


def test_rates_that_diverge_are_no_candidates() -> None:
    found = grow_rate(lambda rate: math.nan if rate > 2e-5 else rate)
    assert best_rate(found) == 1e-7 and found[1e-7] == 1e-7
    assert best_rate({1e-3: math.inf, 1e-4: math.nan}) == 1e-4


def test_the_next_rate() -> None:
    assert [next_rate(r, up=True) for r in (1e-4, 3e-4, 1e-3)] == [3e-4, 1e-3, 3e-3]
    assert [next_rate(r, up=False) for r in (1e-4, 3e-4, 3e-5)] == [3e-5, 1e-4, 1e-5]


def test_two_settings_grow_each_by_itself() -> None:
    asked = []

    def measure(options: dict[str, float]) -> tuple[float, float]:
        asked.append(tuple(options.values()))
        return abs(math.log10(options["lr"] / 1e-5)) + abs(math.log10(options["strength"] / 1e3)), 0.0

    grid = [{"lr": lr, "strength": s} for lr in (1e-4, 3e-4) for s in (1e2, 1e3, 1e4)]
    found = grow(measure, grid, threes)
    assert dict(found.best) == {"lr": 1e-5, "strength": 1e3}
    assert len(asked) == len(set(asked)) == len(grid) + 3  # 3e-5, 1e-5 and 3e-6, at the best strength alone


def test_a_fixed_setting_and_a_fixed_grid_stay() -> None:
    found = grow(
        lambda options: -options["weight"], [{"weight": 1.0, "ridge": 300.0}, {"weight": 3.0, "ridge": 300.0}], fixed
    )
    assert dict(found.best) == {"weight": 3.0, "ridge": 300.0} and len(found.tried) == 2
    assert grow_rate(lambda rate: -rate, (1e-3, 2e-3), fixed) == {1e-3: -1e-3, 2e-3: -2e-3}


def test_factors() -> None:
    found = grow_rate(lambda rate: abs(math.log(rate / 0.02)), (1.5e-3, 3e-3, 6e-3), times(2.0))
    assert list(found) == [1.5e-3, 3e-3, 6e-3, 0.012, 0.024, 0.048] and best_rate(found) == 0.024
    assert min(grow_rate(lambda rate: math.inf, (1e-6, 2e-6), times(2.0))) >= 1e-7


def test_of_equals_the_first_stands_and_the_grid_does_not_run_away() -> None:
    assert sorted(grow_rate(lambda rate: 1.0, (1e-5, 3e-5))) == [3e-6, 1e-5, 3e-5]
