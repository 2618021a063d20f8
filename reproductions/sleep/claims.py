"""What this answers."""

from __future__ import annotations

from reproductions.harness.claims import Claim

CLAIMS: tuple[Claim, ...] = ()
