"""The tables and figures of the papers, at a size that runs here: `python -m reproductions`."""
