"""Dropout off means off, wherever an architecture keeps its rates; a random number left over is noticed at step 0."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import FalconConfig, GraniteConfig, MixtralConfig, OPTConfig, PreTrainedConfig

from alignkit.errors import ModelError
from alignkit.models.start import builtin_tokenizer
from alignkit.runs.directory import RunDir
from alignkit.train.recorder import check_step_zero
from alignkit.train.trainer import switch_off_dropout

SIZES = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {"intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS = {
    "function": GraniteConfig(**SIZES, **MLP, attention_dropout=0.5),
    "layerdrop": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5),
    "config": FalconConfig(**SIZES, attention_dropout=0.5, hidden_dropout=0.5),
    "jitter": MixtralConfig(**SIZES, **MLP, num_local_experts=4, attention_dropout=0.5, router_jitter_noise=0.5),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_computes_what_evaluation_does_and_the_saved_config_keeps_its_rates(kind: str) -> None:
    from transformers import AutoModelForCausalLM

    config: PreTrainedConfig = CONFIGS[kind]
    model = AutoModelForCausalLM.from_config(config)
    kept = model.config.to_dict()
    ids = torch.arange(64).reshape(4, 16)
    expected = model.eval()(input_ids=ids).logits
    assert (model.train()(input_ids=ids).logits - expected).abs().max() > 1e-3
    switch_off_dropout(model)
    torch.testing.assert_close(model.train()(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
    assert model.config.to_dict() == kept


@pytest.mark.parametrize("method", ["dpo", "rm", "kto"])
def test_a_step_without_dropout_is_checked_in_training(method: str, make_stage: Callable, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(CONFIGS["layerdrop"]).save_pretrained("opt")
    builtin_tokenizer().save_pretrained("opt")
    section = "dpo" if method == "kto" else method
    extra = ", loss_type: kto" if method == "kto" else ""
    stage = make_stage(
        "name: t\nmodel: {path: opt, dtype: float32, chat_template: chatml}\n"
        f"{section}: {{data: {{path: builtin:preferences, max_rows: 8}}, batch_size: 4, max_steps: 1{extra}}}",
        section,
    )
    run = RunDir(tmp_path / "built")
    run.path.mkdir()
    trainer = importlib.import_module(f"alignkit.train.{section}").build(stage, run).trainer
    check_step_zero(stage, trainer)
    layer = next(module for module in trainer.model.modules() if type(module).__name__ == "OPTDecoderLayer")
    layer.dropout = 0.5
    with pytest.raises(ModelError, match=r"in training and .* in evaluation.*set disable_dropout: false"):
        check_step_zero(stage, trainer)
