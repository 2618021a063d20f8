"""docs/results.md is what the rows say."""

from __future__ import annotations

import pytest

from reproductions.harness import claims, command


def test_the_committed_page_is_the_generated_one() -> None:
    assert claims.PAGE.read_text(encoding="utf-8") == claims.page(), "python -m reproductions --claims writes it anew"


def test_every_reproduction_declares_what_it_answers() -> None:
    assert list(claims.declared()) == command.names()


def test_what_ran_has_a_figure_and_what_did_not_has_none() -> None:
    ran = [claim for found in claims.declared().values() for claim in found]
    assert all(claim.here is not None and claim.verdict != "not run" for claim in ran)
    assert all(claim.here is None and claim.verdict == "not run" for claim in claims.not_run())
    sources = [claim.source for claim in (*ran, *claims.not_run())]
    assert len(sources) == len(set(sources))


@pytest.mark.parametrize("name", list(claims.declared()))
def test_a_figure_changes_with_the_rows(name: str) -> None:
    """No figure is written by hand: every number of the rows a tenth higher, and each claim says something else."""
    rows = claims.read_rows(claims.ROOT / name / claims.NAME)

    def raised(value: object) -> object:
        if isinstance(value, list):
            return [raised(one) for one in value]
        if isinstance(value, dict):
            return {key: raised(one) if key not in KEYS else one for key, one in value.items()}
        return value * 1.1 if isinstance(value, float) else value

    for claim in claims.declared()[name]:
        assert claim.here is not None
        if "solves 0" not in claim.here(rows):
            assert claim.here([raised(row) for row in rows]) != claim.here(rows), claim.source  # type: ignore[misc]


KEYS = ("rate", "options", "momenta", "sizes")
