"""How texts are studied."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nestling.settings import check, setting

PANEL = "Study"


@dataclass(frozen=True)
class Study:
    """How texts are studied.

    Attributes:
        rounds: visits of every passage at most. The rate falls along a cosine over so many.
        until: share of the exercises that are known when it ends early; 1 or more studies all rounds.
        lr: of AdamW, on the factors or weights of all levels; None is 2e-3, and 3e-4 for levels of full weights.
        batch: exercises a step.
        most: exercises of a passage in a round.
        kinds: of what is asked for, that the base model names: so many exercises ask for it by its kind; 0 is none.
        preserve: weight of the share of the layers' outputs that is changed on the model's own text; see
            `Preservation`. Only levels of low rank have it; full weights are held by what the learner rehearses.
        others: exercises a step that are said of other people: there the model shall say what it said before. None is
            4 where the memory speaks everywhere; within a scope it is silent of them, and there are none.
        specific: weight of the divergence on those.
        everywhere: act in all text. Without it a new memory of low rank gets a scope: it is silent until a text names
            something that was studied (`store.scope`), so that all other text is as the base model has it. A memory
            goes on as it was begun.
        seed: of the order, and of those people.
    """

    rounds: int = setting(10, help="Rounds through all passages at most.", panel=PANEL, at_least=1)
    until: float = setting(0.95, help="Share known at which it ends.", panel=PANEL, above=0)
    lr: float | None = setting(
        None,
        help="Learning rate. Default: 2e-3, and 3e-4 for full weights.",
        flag="lr",
        panel=PANEL,
        above=0,
        below=math.inf,
    )
    batch: int = setting(8, help="Exercises a step.", panel=PANEL, at_least=1)
    most: int = setting(9, help="Exercises of a passage in a round at most.", panel=PANEL, at_least=1)
    kinds: int = setting(
        2,
        help="Exercises that ask for something by its kind (bird, town), as the model names it.",
        panel=PANEL,
        at_least=0,
    )
    preserve: float = setting(
        1.0, help="Weight of what the model knew before.", panel=PANEL, at_least=0, below=math.inf
    )
    others: int | None = setting(
        None,
        help="Exercises a step said of people of whom nothing is told. Default: 4 with --everywhere, else 0.",
        flag="others",
        panel=PANEL,
        at_least=0,
    )
    specific: float = setting(1.0, help="Weight of those.", panel=PANEL, at_least=0, below=math.inf)
    everywhere: bool = setting(
        False,
        help="Let the memory act in all text, and not only from where a text names what was studied.",
        flag="everywhere",
        panel=PANEL,
    )
    seed: int = setting(0, help="Of the order, and of those people.", panel=PANEL, at_least=0)

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range."""
        check(self)
