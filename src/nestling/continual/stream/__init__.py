"""A stream of tokens: its chunks, their losses, its documents."""
