from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.errors import ModelError
from alignkit.models.chat import load_tokenizer
from alignkit.models.load import load_policy, load_trained
from alignkit.models.parameters import compare_probes, take_probe
from alignkit.models.save import merge, save_model
from alignkit.recipe.stage import Stage

MakeStage = Callable[..., Stage]


def save_adapter(stage: Stage) -> Path:
    """Save an adapter whose B is not zero any more."""
    loaded = load_policy(stage, run_dir=Path(stage.run_dir))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    out = Path(stage.run_dir) / "model"
    options = {"lineage": loaded.lineage, "precision": loaded.precision, "stop_ids": [508, 511]}
    save_model(loaded.model, load_tokenizer(stage), out, **options)
    return Path(stage.run_dir)


@pytest.mark.parametrize("path", ["builtin:tiny-gpt2", "builtin:tiny-llama"])
def test_merged_model_loads_with_plain_transformers_and_computes_the_same(
    make_stage: MakeStage, tmp_path: Path, path: str
) -> None:
    run_dir = save_adapter(make_stage(lora={}, path=path))
    merge(run_dir, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = take_probe(load_trained(run_dir, device="cpu"), vocab_size=512, reward=False)
    assert compare_probes(expected, take_probe(plain, vocab_size=512, reward=False)) is None
    assert plain.generation_config.eos_token_id == [508, 511] and plain.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert "<|im_end|>" in tokenizer.chat_template
    assert not list((tmp_path / "merged").glob("*.bin"))


def test_whole_model_and_full_directory_are_refused(make_stage: MakeStage, tmp_path: Path) -> None:
    run_dir = save_adapter(make_stage(lora={}))
    merge(run_dir, tmp_path / "merged")
    with pytest.raises(ModelError, match="is a whole model already"):
        merge(tmp_path / "merged", tmp_path / "again")
    with pytest.raises(ModelError, match="--out: .* is not empty"):
        merge(run_dir, tmp_path / "merged")
