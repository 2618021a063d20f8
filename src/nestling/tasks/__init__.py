"""Data of the evaluations: generators of synthetic tasks, and readers of real sets."""
