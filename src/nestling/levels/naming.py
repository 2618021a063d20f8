"""Short names for many parameters: equal parts of a model under one name, `blocks.*.mixer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

MOST = 8
"""Groups of parameters that are told apart in one level; with more, names are cut shorter."""
VECTORS = "norms, biases and other vectors"


def pattern_of(model: nn.Module, path: str) -> str:
    """A path with the first index into an `nn.ModuleList` as `*`: one name for what stands in every block."""
    module: nn.Module | None = model
    parts = path.split(".") if path else []
    for i, part in enumerate(parts):
        if isinstance(module, nn.ModuleList):
            return ".".join([*parts[:i], "*", *parts[i + 1 :]])
        module = getattr(module, part, None)
    return path


def group_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Parameter names in at most `MOST` groups, by the part of the model they belong to.

    In repeated blocks a part is a child of the block; elsewhere it is the module that holds the parameter, or where
    that makes too many groups, a module around it. Groups without a single matrix become one, `VECTORS`.
    """
    parameters: Mapping[str, Tensor] = dict(model.named_parameters())
    names = list(names)
    modules = {name: pattern_of(model, name).rpartition(".")[0] for name in names}
    depth = max((path.count(".") + 1 for path in modules.values()), default=0)
    while True:
        parts: dict[str, list[str]] = {}
        for name in names:
            parts.setdefault(_part(modules[name], depth), []).append(name)
        plain = {key for key, members in parts.items() if all(parameters[n].dim() < 2 for n in members)}
        if len(parts) - max(len(plain) - 1, 0) <= MOST or depth <= 1:
            break
        depth -= 1
    groups: dict[str, list[str]] = {}
    alone = len(plain) < 2 and len(parts) > 1
    for key, members in parts.items():
        name = VECTORS if key in plain and not (alone and key) else _common([modules[n] for n in members])
        groups.setdefault(_with_type(model, name) or "parameters", []).extend(members)
    return groups


def _with_type(model: nn.Module, name: str) -> str:
    """A place in an `nn.Sequential` says little: its type is added."""
    if not name.rpartition(".")[2].isdigit() or "*" in name:
        return name
    return f"{name} ({type(model.get_submodule(name)).__name__})"


def _part(path: str, depth: int) -> str:
    parts = path.split(".")
    end = parts.index("*") + 2 if "*" in parts else depth
    return ".".join(parts[:end])


def _common(paths: list[str]) -> str:
    split = [path.split(".") for path in paths]
    shared = []
    for column in zip(*split, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)
