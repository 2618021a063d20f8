"""Levels: a model and its optimizer as a nested system (NL section 3)."""
