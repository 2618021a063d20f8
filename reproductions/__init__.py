"""The tables and figures of the papers, at a size that runs here: `python -m reproductions`."""

import nestling  # noqa: F401  (settles how threads wait, before an experiment loads torch)
