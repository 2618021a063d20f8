"""The `nestling` command."""

from __future__ import annotations

from nestling.cli.app import main

__all__ = ["main"]
