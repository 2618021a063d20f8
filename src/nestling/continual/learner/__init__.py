"""The learner: options, levels, steps, and what it learns."""
