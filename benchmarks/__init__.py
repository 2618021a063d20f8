"""Speed and memory of the layers, measured here and now: `make bench`, or `python -m benchmarks --help`.

Machines differ and so does the same machine from minute to minute, so every verdict is a ratio between two things
measured alternately in one run. Absolute rates are printed for orientation only.
"""
