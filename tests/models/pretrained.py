"""Tiny pre-trained models of every family that can be converted, drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rms_norm_eps=1e-3)),
    "llama bias tied llama3": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, attention_bias=True, tie_word_embeddings=True, head_dim=12, rope_parameters=LLAMA3)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen2 sliding": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, **SLIDING)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, rope_parameters=LINEAR)),
    "qwen3 bias sliding": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8, attention_bias=True, **SLIDING)),
    "mistral window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None, head_dim=16)),
}


def pretrained(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a family whose gains and biases are not one and zero either."""
    return randomized(FAMILIES[family], seed)


def randomized(make: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """Any model so."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def truly_double(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64 throughout; transformers takes norms and rotations in float32 whatever the weights are."""
    model = model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    rope, base = model.model.rotary_emb, model.config.rope_parameters
    width = 2 * len(rope.inv_freq)
    exact = base["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
    frequency = exact if base["rope_type"] == "default" else rope.inv_freq.double()

    def rotate(x: torch.Tensor, position_ids: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        angle = (position_ids[..., None] * frequency).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    rope.forward = rotate
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes after four special tokens, with a chat template."""
    symbols = {c: i + 4 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | symbols, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    return made


def save_pretrained(directory: Path, family: str = "llama") -> PreTrainedModel:
    """Write a model and a tokenizer as a user has them; returns the model."""
    model = pretrained(family)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return model
