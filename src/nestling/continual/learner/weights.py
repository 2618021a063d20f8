"""What a level learns: its parameters themselves, or low-rank factors beside them.

Both kinds can be put on a model and taken off it again, exactly, so that several learners share one base model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nestling.continual.store.records import LowRank, dense, shape_of
from nestling.continual.store.scope_gate import ScopeGate, add_beside


class OnModel(Protocol):
    """What a model can do without."""

    def attach(self) -> None:
        """Put what was learned on the model."""

    def detach(self) -> None:
        """Leave the model as it was before."""


class LevelWeights(OnModel, Protocol):
    """The weights of one level."""

    @property
    def owner(self) -> nn.Module:
        """The module whose parameters an optimizer shall look at."""

    @property
    def learned(self) -> list[Tensor]:
        """What the optimizer steps."""

    @property
    def values(self) -> list[Tensor]:
        """What was learned, on the model or apart, in the order of `learned`."""

    @property
    def anchored(self) -> list[tuple[Tensor, Tensor]]:
        """(value, pre-trained value) of what retention and consolidation pull back: scaling these differences by a
        factor scales the level's difference by it."""

    def differences(self) -> dict[str, Tensor | LowRank]:
        """Learned minus base by name, float32, on the CPU; unchanged parameters left out."""

    def exact(self) -> dict[str, Tensor]:
        """What `differences` lacks to give the learned values to the last bit."""

    def check(self, differences: Mapping[str, Tensor | LowRank], exact: Mapping[str, Tensor]) -> None:
        """Raises ValueError where `load` could not take them."""

    def load(self, differences: Mapping[str, Tensor | LowRank], exact: Mapping[str, Tensor]) -> None:
        """Become what `differences` and `exact` were taken of; both are checked."""


class FullWeights:
    """The parameters themselves. Costs one copy of them: the base while attached, the learned ones while not.

    Args:
        model: the base model.
        names: of the level's parameters.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        found = dict(model.named_parameters())
        self.owner = model
        self.parameters = {name: found[name] for name in names}
        self.other = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.attached = True

    @property
    def learned(self) -> list[Tensor]:
        """The parameters."""
        return list(self.parameters.values())

    @property
    def values(self) -> list[Tensor]:
        """The learned values: of the parameters while attached."""
        return [self._pair(name)[0] for name in self.parameters]

    @property
    def anchored(self) -> list[tuple[Tensor, Tensor]]:
        """Every parameter and its base."""
        return [(p, self.other[name]) for name, p in self.parameters.items()]

    def attach(self) -> None:
        """Exchange base and learned values."""
        if not self.attached:
            self._swap()

    def detach(self) -> None:
        """Exchange learned and base values."""
        if self.attached:
            self._swap()

    def differences(self) -> dict[str, Tensor | LowRank]:
        """Learned minus base, float32."""
        pairs = ((name, *self._pair(name)) for name in self.parameters)
        return {name: _difference(new, old) for name, new, old in pairs if not torch.equal(new, old)}

    def exact(self) -> dict[str, Tensor]:
        """Where base + difference is not the learned value (it is, by Sterbenz' lemma, wherever that is between half
        and twice the base): flat indices, and the values there."""
        found: dict[str, Tensor] = {}
        for name in self.parameters:
            new, old = self._pair(name)
            wrong = (_sum(old, _difference(new, old)) != new).flatten().nonzero()[:, 0]
            if len(wrong):
                found |= {f"{name}.index": wrong.cpu(), f"{name}.value": new.flatten()[wrong].cpu()}
        return found

    def check(self, differences: Mapping[str, Tensor | LowRank], exact: Mapping[str, Tensor]) -> None:
        """Raises ValueError for a difference of another shape than its parameter, or corrections not of it."""
        for name, p in self.parameters.items():
            if name not in differences:
                continue
            if (shape := shape_of(differences[name])) != tuple(p.shape):
                raise ValueError(f"the memory's difference of {name} has shape {shape}, the parameter {tuple(p.shape)}")
            index, value = (exact.get(f"{name}.{part}", torch.empty(0)) for part in ("index", "value"))
            fits = index.dim() == 1 and index.shape == value.shape
            inside = not len(index) or (index.dtype == torch.int64 and 0 <= index.min() <= index.max() < p.numel())
            if not fits or not inside:
                raise ValueError(f"the memory's exact values of {name} are not of its {p.numel()} numbers")

    @torch.no_grad()
    def load(self, differences: Mapping[str, Tensor | LowRank], exact: Mapping[str, Tensor]) -> None:
        """Base + difference, corrected."""
        for name in self.parameters:
            new, old = self._pair(name)
            difference = differences.get(name)
            if difference is None:
                new.copy_(old)
                continue
            new.copy_(_sum(old, dense(difference).to(new.device)))
            if (index := exact.get(f"{name}.index")) is not None:
                new.view(-1)[index.to(new.device)] = exact[f"{name}.value"].to(new)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Learned and base values."""
        here, there = self.parameters[name].detach(), self.other[name]
        return (here, there) if self.attached else (there, here)

    def _swap(self) -> None:
        exchange(list(self.parameters.values()), list(self.other.values()))
        self.attached = not self.attached


class Factors(nn.Module):
    """`x -> left right x`; `left` begins as zero, so that the difference does.

    Args:
        like: the layer whose difference this is.
        rank: of the difference.
        generator: of the first values of `right`, with variance 1 / in.
    """

    def __init__(self, like: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        place = {"device": like.weight.device, "dtype": like.weight.dtype}
        self.right = nn.Linear(like.in_features, rank, bias=False, **place)
        self.left = nn.Linear(rank, like.out_features, bias=False, **place)
        self.begin(generator)

    @torch.no_grad()
    def begin(self, generator: torch.Generator) -> None:
        """First values."""
        rank, width = self.right.weight.shape
        drawn = torch.randn(rank, width, generator=generator, dtype=torch.float64)
        self.right.weight.copy_(drawn / math.sqrt(width))
        self.left.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The difference of the layer's output."""
        return self.left(self.right(x))


class LowRankWeights:
    """Factors beside weights of `nn.Linear` layers (LoRA, arXiv:2106.09685, without its scale), added by forward hooks.

    Costs rank * (in + out) numbers a weight; the base needs no copy.

    Args:
        model: the base model.
        names: of the level's parameters, each the weight of one `nn.Linear`.
        rank: of every difference.
        seed: of the factors' first values.
        gate: where they are added; None is everywhere.

    Raises:
        ValueError: a parameter that is no weight of an `nn.Linear`, or a rank above what a weight has.
    """

    def __init__(self, model: nn.Module, names: list[str], rank: int, seed: int, gate: ScopeGate | None = None) -> None:
        layers = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
        if missing := [name for name in names if name not in layers]:
            raise ValueError(f"rank={rank} is for weights of nn.Linear layers, and {missing[0]} is none; give patterns "
                             "that fit such weights only, or no rank")  # fmt: skip
        for name in names:
            if rank > min(layers[name].weight.shape):
                raise ValueError(f"rank={rank} is more than {name} of shape {tuple(layers[name].weight.shape)} has")
        generator = torch.Generator().manual_seed(seed)
        self.seed, self.gate = seed, gate or ScopeGate()
        self.layers = {name: layers[name] for name in names}
        self.factors = {name: Factors(layer, rank, generator) for name, layer in self.layers.items()}
        self.owner: nn.Module = nn.ModuleList(self.factors.values())
        self.handles: list[RemovableHandle] = []
        self.attach()

    @property
    def learned(self) -> list[Tensor]:
        """The factors."""
        return list(self.owner.parameters())

    @property
    def values(self) -> list[Tensor]:
        """The factors' values."""
        return [p.detach() for p in self.learned]

    @property
    def anchored(self) -> list[tuple[Tensor, Tensor]]:
        """The left factors, which begin as zero."""
        return [(f.left.weight, torch.zeros((), dtype=f.left.weight.dtype, device=f.left.weight.device)
                 .expand_as(f.left.weight)) for f in self.factors.values()]  # fmt: skip

    def attach(self) -> None:
        """Hooks on."""
        if not self.handles:
            # A partial, and no function made here: a copy of the model then has copies of the factors.
            hooks = {name: partial(add_beside, self.gate, factors) for name, factors in self.factors.items()}
            self.handles = [
                self.layers[name].register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()
            ]

    def detach(self) -> None:
        """Hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def differences(self) -> dict[str, Tensor | LowRank]:
        """The factors, float32."""
        return {name: LowRank(_float32(f.left.weight), _float32(f.right.weight)) for name, f in self.factors.items()}

    def exact(self) -> dict[str, Tensor]:
        """The factors themselves where they are no float32."""
        found: dict[str, Tensor] = {}
        for name, factors in self._uncommon():
            found |= {f"{name}.left": factors.left.weight.detach().cpu().clone()}
            found |= {f"{name}.right": factors.right.weight.detach().cpu().clone()}
        return found

    def check(self, differences: Mapping[str, Tensor | LowRank], exact: Mapping[str, Tensor]) -> None:
        """Raises ValueError for a difference that is not of factors, of a higher rank or of another shape."""
        for name, factors in self.factors.items():
            if (found := differences.get(name)) is None:
                continue
            most, shape = factors.right.out_features, (factors.left.out_features, factors.right.in_features)
            rank = found.left.shape[1] if isinstance(found, LowRank) else most + 1
            if rank > most or shape_of(found) != shape:
                raise ValueError(f"the memory's difference of {name} is not of rank {most}; "
                                 "make the learner with the rank of the memory")  # fmt: skip
            assert isinstance(found, LowRank)
            for side, own in (("left", found.left), ("right", found.right)):
                if exact.get(f"{name}.{side}", own).shape != own.shape:
                    raise ValueError(f"the memory's exact values of {name} have another shape than its difference")

    def start_again(self) -> None:
        """As at the beginning."""
        self.load({}, {})

    @torch.no_grad()
    def load(self, differences: Mapping[str, Tensor | LowRank], exact: Mapping[str, Tensor]) -> None:
        """Take factors of the same rank, or of a smaller one: the others start as at the beginning."""
        generator = torch.Generator().manual_seed(self.seed)
        for name, factors in self.factors.items():
            # Whatever these factors have learned before must not stay beside what comes.
            factors.begin(generator)
            if isinstance(found := differences.get(name), LowRank):
                rank = found.left.shape[1]
                factors.left.weight[:, :rank] = exact.get(f"{name}.left", found.left)
                factors.right.weight[:rank] = exact.get(f"{name}.right", found.right)

    def _uncommon(self) -> Iterator[tuple[str, Factors]]:
        for name, factors in self.factors.items():
            if factors.left.weight.dtype != torch.float32:
                yield name, factors


@contextmanager
def taken_off(levels: Iterable[OnModel]) -> Iterator[None]:
    """The model as it was before it learned, and as it is afterwards."""
    with ExitStack() as back:
        for weights in levels:
            weights.detach()
            back.callback(weights.attach)
        yield


@torch.no_grad()
def exchange(here: Sequence[Tensor], there: Sequence[Tensor]) -> None:
    """The values of two lists of tensors change places: all of them, or none where it fails."""
    done: list[tuple[Tensor, Tensor]] = []
    try:
        for pair in zip(here, there, strict=True):
            _exchange(*pair)
            done.append(pair)
    except BaseException:
        for pair in done:
            _exchange(*pair)
        raise


@contextmanager
def exchanged(here: Sequence[Tensor], there: Sequence[Tensor]) -> Iterator[None]:
    """`exchange` for a block, however it ends."""
    exchange(here, there)
    try:
        yield
    finally:
        exchange(here, there)


def _exchange(a: Tensor, b: Tensor) -> None:
    old = a.detach().clone(), b.detach().clone()
    try:
        a.copy_(old[1])
        b.copy_(old[0])
    except BaseException:
        a.copy_(old[0])
        b.copy_(old[1])
        raise


def _difference(new: Tensor, old: Tensor) -> Tensor:
    wide = torch.promote_types(new.dtype, torch.float32)
    return (new.to(wide) - old.to(wide)).float().cpu()


def _sum(old: Tensor, difference: Tensor) -> Tensor:
    wide = torch.promote_types(old.dtype, torch.float32)
    return (old.to(wide) + difference.to(device=old.device, dtype=wide)).to(old.dtype)


def _float32(x: Tensor) -> Tensor:
    return x.detach().to(device="cpu", dtype=torch.float32, copy=True)
