"""Looped depth: the blocks run several times, and before every further time their input is added again.

$$x_1 = f(e), \\qquad x_{i+1} = f(x_i + e)$$

e are the embeddings and f all blocks of the model, with a state of its own in every loop. Without e a later loop sees
the tokens only through what the loops before kept of them (arXiv:2311.12424, whose rule this is). The sum has no
parameters, so any model can be run with any number of loops, and one loop is the model as it always was. Huginn
(arXiv:2502.05171) joins x and e by a learned matrix, and finds that small models do as well with the sum.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from nestling.models.cache import ModelState


def inject(x: Float[Tensor, "N L hidden"], embedded: Float[Tensor, "N L hidden"]) -> Float[Tensor, "N L hidden"]:
    """What a further loop begins with: what the one before it came to, and the embeddings."""
    return x + embedded


def check_loops(loops: object) -> int:
    """`loops`, if the blocks can run so often.

    Raises:
        ValueError: no whole number from 1.
    """
    if isinstance(loops, bool) or not isinstance(loops, int) or loops < 1:
        raise ValueError(f"loops says how often the blocks run, a whole number from 1, not {loops!r}")
    return loops


def loops_to_run(wanted: int | None, usual: int, blocks: int, state: ModelState | None) -> int:
    """How often the blocks run in a call.

    Args:
        wanted: by the caller; None leaves it to the state, and without one to `usual`.
        usual: what the configuration says.
        blocks: of the model.
        state: that the call goes on from; every loop has its own part of it.

    Raises:
        ValueError: a number that is none, or that is not the state's; a state of another number of blocks.
    """
    loops = None if wanted is None else check_loops(wanted)
    if state is None:
        return usual if loops is None else loops
    if len(state.layers) != blocks:
        raise ValueError(
            f"the state has {len(state.layers)} blocks and the model {blocks}; go on with the model that made it"
        )
    if loops is not None and loops != state.loops:
        raise ValueError(
            f"the state was made with loops={state.loops} and cannot be continued with loops={loops}, since every loop "
            "has memories of its own; leave loops out, or read the text again from the start"
        )
    return state.loops
