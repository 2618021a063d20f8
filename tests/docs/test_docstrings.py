"""The examples in docstrings run, and every public entry point has one."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINTS = [
    "nestling.models.causal_lm.NestlingForCausalLM",
    "nestling.models.modeling.NestlingModel",
    "nestling.models.cache.ModelState",
    "nestling.models.configuration.NestlingConfig",
    "nestling.models.conversion.convert",
    "nestling.models.presets.delta.gated_deltaproduct",
    "nestling.models.presets.hope.hope",
    "nestling.models.presets.linear.linear_attention",
    "nestling.models.presets.titans.titans_lmm",
    "nestling.models.presets.ttt.ttt_linear",
    "nestling.layers.attention.SoftmaxAttention",
    "nestling.layers.continuum.ContinuumMemory",
    "nestling.layers.linear.LinearMemory",
    "nestling.layers.mamba2.Mamba2",
    "nestling.layers.neural_memory.NeuralMemory",
    "nestling.layers.rwkv7.RWKV7",
    "nestling.layers.self_modifying.SelfModifyingTitans",
    "nestling.layers.titans.MemoryAsContext",
    "nestling.layers.titans.MemoryAsGate",
    "nestling.layers.titans.MemoryAsLayer",
    "nestling.layers.ttt.TTTLayer",
    "nestling.optim.build.build",
    "nestling.optim.deep_momentum.DeepMomentum",
    "nestling.optim.delta_gradient_descent.DeltaGradientDescent",
    "nestling.optim.delta_momentum.DeltaMomentum",
    "nestling.optim.feature_momentum.FeatureMomentum",
    "nestling.optim.generalized_gradient_descent.GeneralizedGradientDescent",
    "nestling.optim.generalized_momentum.GeneralizedMomentum",
    "nestling.optim.groups.matrix_groups",
    "nestling.optim.m3.M3",
    "nestling.optim.multi_frequency.MultiFrequency",
    "nestling.optim.oja.OjaGradientDescent",
    "nestling.optim.preconditioned_momentum.PreconditionedMomentum",
    "nestling.levels.inspection.inspect",
    "nestling.continual.learner.learner.Learner",
    "nestling.continual.store.memory.Memory",
    "nestling.continual.store.store.MemoryStore",
    "nestling.training.run.train",
]


def modules_with_examples() -> list[str]:
    """Every module of the package that has an example somewhere."""
    found = [p for p in (ROOT / "src").rglob("*.py") if "    >>> " in p.read_text(encoding="utf-8")]
    return sorted(".".join(p.relative_to(ROOT / "src").with_suffix("").parts) for p in found)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_points_have_an_example(name: str) -> None:
    """What a user begins with is shown at work."""
    module, _, item = name.rpartition(".")
    assert ">>> " in (getattr(importlib.import_module(module), item).__doc__ or ""), f"{name} has no example"


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty directory, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name, globs={}):
        runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)
    assert runner.tries
