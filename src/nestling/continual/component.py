"""An option of a learner as a component: what it does around a chunk, and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from nestling.continual.stream.chunks import Piece

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner

KEY = "component"  # of a field's metadata
LEARNING = "Learning"  # heading of a learner's flags in a command's help


@dataclass(frozen=True)
class Companion:
    """Pieces that are read with a chunk.

    Attributes:
        pieces: with a target each, or more.
        weight: of their mean loss beside the chunk's.
        losses: of a batch of them, with gradients, in a pass of their own. None is cross-entropy in the chunk's pass.
        projection: take out of every level's gradient of the chunk what would raise that loss; needs `losses`.
    """

    pieces: Sequence[Piece]
    weight: float
    losses: Callable[[Sequence[Piece]], Float[Tensor, " targets"]] | None = None
    projection: bool = False


@dataclass(frozen=True)
class Bounds:
    """Losses in nats that are learned from lie above these: `token` of single targets, `chunk` of a chunk's mean."""

    token: float = -math.inf
    chunk: float = -math.inf


class LearnerComponent:
    """What a learner does besides stepping its levels. Every method does nothing unless a component has it.

    A component belongs to a field of `Options`, whose value is its settings: `component_field` names it there, and that
    is all a new one needs. What it keeps stands in a memory under that field's name.

    Args:
        settings: the field's value, not its default.
        learner: whose weights are attached; its optimizer is not made yet.

    Raises:
        ValueError: settings that do not fit the learner.
    """

    draws: ClassVar[bool] = False
    """Whether it draws random numbers, for which the learner's seed must be 0 or more."""
    reads_apart: bool = False
    """Whether its companions are read in passes of their own, which optimizers that watch layer inputs cannot take."""

    def __init__(self, settings: Any, learner: Learner) -> None:
        self.learner = learner

    def companions(self) -> Sequence[Companion]:
        """What is read with the present chunk, which is full."""
        return ()

    def bounds(self) -> Bounds:
        """What of the present chunk is learned from."""
        return Bounds()

    def before_step(self, due: Sequence[str]) -> None:
        """The levels of these names step next."""

    def after_step(self, due: Sequence[str]) -> None:
        """The levels of these names have stepped."""

    def learned(self, pieces: Sequence[Piece], losses: Float[Tensor, " targets"]) -> None:
        """A chunk was learned from, or left out by `bounds`, and counted. `losses` are on the CPU, perhaps none."""

    def replaced(self) -> None:
        """The weights are others than before, not by learning from a chunk."""

    def undo(self) -> Callable[[], None]:
        """What puts back whatever an interrupted chunk has changed."""
        return lambda: None

    def tensors(self) -> dict[str, Tensor]:
        """What it keeps, by name; "" is the component's own name."""
        return {}

    def values(self) -> Any:
        """What it keeps besides, JSON values; None is nothing."""
        return None

    def prepare(self, tensors: Mapping[str, Tensor], values: Any) -> Callable[[], None]:
        """Check what a memory has of `tensors` and `values`, both empty where it has nothing, and return what takes
        it. That is called when the weights are those of the memory.

        Raises:
            ValueError: it does not fit.
        """
        return self.replaced


def component_field(kind: type[LearnerComponent], declared: Any) -> Any:
    """A field of `Options` with a component, which is made where the value is not the default.

    Args:
        kind: made from the field's value.
        declared: the field, by `dataclasses.field` or `nestling.settings.setting`.
    """
    declared.metadata = {**declared.metadata, KEY: kind}
    return declared


def components_of(options: Any) -> dict[str, tuple[type[LearnerComponent], Any]]:
    """The components an `Options` asks for by field, in the order of the fields, each with its settings."""
    asked = {f.name: f for f in fields(options) if KEY in f.metadata and getattr(options, f.name) != f.default}
    return {name: (_kind(found), getattr(options, name)) for name, found in asked.items()}


def own(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a memory's tensors those of one component, by its own names."""
    return {key[len(name) + 1 :]: t for key, t in tensors.items() if key == name or key.startswith(f"{name}.")}


def named(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A component's tensors by their names in a memory."""
    return {f"{name}.{key}" if key else name: tensor for key, tensor in tensors.items()}


def strictest(bounds: Sequence[Bounds]) -> Bounds:
    """The largest of each."""
    found = Bounds()
    for each in bounds:
        found = replace(found, token=max(found.token, each.token), chunk=max(found.chunk, each.chunk))
    return found


@contextmanager
def undone_on_error(components: Iterable[LearnerComponent]) -> Iterator[None]:
    """Where the block fails, components are as before it."""
    undo = [component.undo() for component in components]
    try:
        yield
    except BaseException:
        for back in undo:
            back()
        raise


def _kind(declared: Field[Any]) -> type[LearnerComponent]:
    kind: type[LearnerComponent] = declared.metadata[KEY]
    return kind
