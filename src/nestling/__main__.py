"""`python -m nestling` is the `nestling` command."""

from __future__ import annotations

import sys

from nestling.cli import main

if __name__ == "__main__":
    sys.exit(main())
