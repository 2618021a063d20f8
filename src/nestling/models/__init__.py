"""The language model: configuration, model, state and presets."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nestling.models import presets
from nestling.models.cache import BlockState, ModelState
from nestling.models.causal_lm import NestlingForCausalLM
from nestling.models.configuration import NestlingConfig
from nestling.models.conversion import convert
from nestling.models.modeling import NestlingModel

__all__ = ["BlockState", "ModelState", "NestlingConfig", "NestlingForCausalLM", "NestlingModel", "convert", "presets"]

AutoConfig.register(NestlingConfig.model_type, NestlingConfig)
AutoModel.register(NestlingConfig, NestlingModel)
AutoModelForCausalLM.register(NestlingConfig, NestlingForCausalLM)
# The Trainer's label smoothing, pipelines and `transformers serve` know causal language models by this list of names;
# registering with the Auto classes does not enter them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[NestlingConfig.model_type] = NestlingForCausalLM.__name__
