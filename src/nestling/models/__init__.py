"""The language model: configuration, model, state and presets."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from nestling.models import presets
from nestling.models.cache import BlockState, ModelState
from nestling.models.configuration import NestlingConfig
from nestling.models.conversion import convert
from nestling.models.modeling import NestlingForCausalLM

__all__ = ["BlockState", "ModelState", "NestlingConfig", "NestlingForCausalLM", "convert", "presets"]

AutoConfig.register(NestlingConfig.model_type, NestlingConfig)
AutoModelForCausalLM.register(NestlingConfig, NestlingForCausalLM)
