"""Pre-trained models and their tokenizers, from wherever people have them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nestling.errors import UserError
from nestling.models.gguf_file import check_header, complete, read_header, unused_tensors

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
GGUF_MAGIC = b"GGUF"
WEIGHTS = "*.safetensors"
COMPUTED = re.compile(r"(inv_freq|\.masked_bias|attn(\.attention)?\.bias)$")
"""Tensors that older checkpoints hold though models compute them: rotary frequencies and causal masks."""


def load_pretrained(source: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32, in evaluation mode, and its tokenizer.

    Only safetensors and GGUF files are read, never pickles, and no code that comes with a model is run. What stands
    beside the weights counts: rotary scaling of a GGUF file is taken over, and what the model has no place for is
    refused.

    Args:
        source: a directory in Hugging Face's layout (a converted or trained nestling model is one), a GGUF file, or a
            model's name on the Hugging Face hub. What exists as a file or directory is not looked for on the hub.

    Raises:
        UserError: nothing of that name, no safetensors, a damaged file, one that lacks weights or holds more than its
            configuration has a place for, an adapter, or no tokenizer.
    """
    path = Path(source)
    if path.is_dir():
        _check_directory(path)
        place: dict[str, Any] = {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    elif path.is_file():
        _check_gguf(path)
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    elif HUB_ID.fullmatch(str(source)) and not str(source).startswith("."):
        place = {"pretrained_model_name_or_path": str(source)}
    else:
        raise UserError(f"no file or directory {source}; give a model's directory, a GGUF file, or a hub name")
    model = _load_model(source, place)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    except Exception as error:  # damaged files fail in every layer of the libraries underneath
        raise UserError(f"the tokenizer of {source} cannot be loaded ({_reason(error)}); restore its files") from error
    return model, tokenizer


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        if gguf := sorted(path.glob("*.gguf")):
            raise UserError(f"{path} holds no config.json; to take the GGUF file in it, name the file: {gguf[0]}")
        hint = "; merge the adapter into its base model first" if (path / "adapter_config.json").is_file() else ""
        raise UserError(f"{path} holds no model (no config.json){hint}")
    if not any(path.glob(WEIGHTS)):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
        why = "only pickled weights, which may run code when they are read; save it as safetensors first"
        raise UserError(f"{path} holds {why if pickled else 'no weights (no .safetensors file); restore them'}")
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path} holds an adapter beside its model; merge them first")


def _check_gguf(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(len(GGUF_MAGIC))
    if start != GGUF_MAGIC:
        raise UserError(f"{path} is no GGUF file; give a model's directory, a GGUF file, or a hub name")


def _load_model(source: str | Path, place: dict[str, Any]) -> PreTrainedModel:
    model: PreTrainedModel
    header = None
    try:
        more: dict[str, Any] = {}
        if "gguf_file" in place:
            header = read_header(source)
            check_header(header)
            more["config"] = complete(AutoConfig.from_pretrained(**place, trust_remote_code=False), header)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **place,
            **more,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, found = loaded
        if "gguf_file" in place:
            model = _unbound(model)
    except ImportError as error:
        raise UserError(f"{source} needs a package that is not installed ({_reason(error)})") from error
    except Exception as error:  # as above
        hint = "" if Path(source).exists() else f"; there is no file or directory {source} here either"
        raise UserError(f"the model {source} cannot be loaded ({_reason(error)}){hint}") from error
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random
        raise UserError(
            f"{source} lacks {len(missing)} of the model's weights, the first {missing[0]}; restore its files"
        )
    unused = (
        _misplaced(model, found["unexpected_keys"]) if header is None else unused_tensors(header, model.state_dict())
    )
    if unused:
        raise UserError(
            f"{source} holds {unused[0]}, for which a {type(model).__name__} of its configuration has no place, so the "
            "model would not be the one that was saved; correct its configuration, or merge adapters first"
        )
    if broken := [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]:
        raise UserError(f"{source} holds NaN or infinity in {broken[0]}; restore its files")
    return model.eval()


def _misplaced(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Tensors that transformers left out though they belong to a module that the model has, or to a block more of its
    blocks; not those of whole other parts, such as the images' of a model of images and text."""
    modules, buffers = {name for name, _ in model.named_modules()}, {name for name, _ in model.named_buffers()}
    kept = (name for name in sorted(unexpected) if not COMPUTED.search(name) and name not in buffers)
    parents = {name: name.rpartition(".")[0] for name in kept}
    blocks = {name.rpartition(".")[0] for name in modules if name.rpartition(".")[2].isdecimal()}
    return [n for n, parent in parents.items() if parent in modules or any(n.startswith(f"{b}.") for b in blocks)]


def _unbound(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without its tie to the GGUF file, for which transformers refuses to save it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    free = type(model)(model.config)
    free.load_state_dict(model.state_dict())
    free.generation_config = model.generation_config
    return free


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
