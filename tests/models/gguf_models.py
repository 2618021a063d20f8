"""Tiny GGUF files, written as converters to GGUF write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INSIDE = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate"}
INSIDE |= {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.o_proj": "attn_output"}
INSIDE |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    values: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a model, more values of its architecture, and more tensors; returns the path."""
    import gguf

    c = model.config
    kind = c.model_type
    file = gguf.GGUFWriter(str(path), kind)
    file.add_context_length(c.max_position_embeddings)
    file.add_block_count(c.num_hidden_layers)
    file.add_embedding_length(c.hidden_size)
    file.add_feed_forward_length(c.intermediate_size)
    file.add_head_count(c.num_attention_heads)
    file.add_head_count_kv(c.num_key_value_heads)
    file.add_layer_norm_rms_eps(c.rms_norm_eps)
    file.add_rope_freq_base(float(c.rope_parameters["rope_theta"]))
    file.add_vocab_size(c.vocab_size)
    if kind == "llama" and "rope.dimension_count" not in (values or {}):
        file.add_rope_dimension_count(c.head_dim)
    for key, value in (values or {}).items():
        add = {str: file.add_string, float: file.add_float32, int: file.add_uint32, bool: file.add_bool}[type(value)]
        add(f"{kind}.{key}", value)
    _add_tokenizer(file, c.vocab_size)
    for key, weight in model.state_dict().items():
        if key != "lm_head.weight" or not c.tie_word_embeddings:
            file.add_tensor(_renamed(key), np.ascontiguousarray(_rearranged(kind, key, weight, c)))
    for key, value in (tensors or {}).items():
        file.add_tensor(key, value)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def _add_tokenizer(file: Any, size: int) -> None:
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 324))]
    words = ["<bos>", "<eos>", *letters, "th", *(f"<{i}>" for i in range(size))][:size]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("llama-bpe")
    file.add_token_list(words)
    file.add_token_merges(["t h"])
    file.add_token_types([3, 3] + [1] * (size - 2))
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)


def _rearranged(kind: str, key: str, weight: torch.Tensor, c: Any) -> np.ndarray:
    """llama.cpp's Llama turns neighbouring channels, so files have the two halves of a head interleaved."""
    array = weight.detach().float().numpy()
    if kind != "llama" or (".q_proj" not in key and ".k_proj" not in key):
        return array
    heads = c.num_attention_heads if ".q_proj" in key else c.num_key_value_heads
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _renamed(key: str) -> str:
    module, _, kind = key.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{kind}"
    _, _, index, part = module.split(".", 3)
    return f"blk.{index}.{INSIDE[part]}.{kind}"
