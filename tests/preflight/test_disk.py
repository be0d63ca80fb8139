from __future__ import annotations

from pathlib import Path

import pytest

from alignkit.errors import EnvironmentProblem
from alignkit.preflight.disk import checkpoint_bytes, count_trained, require_space
from alignkit.recipe.schema import LoraOptions

SHAPES = {
    "model.embed_tokens.weight": [512, 64],
    "model.layers.0.self_attn.q_proj.weight": [64, 64],
    "model.layers.0.mlp.up_proj.weight": [176, 64],
    "model.norm.weight": [64],
    "lm_head.weight": [512, 64],
}


def test_full_fine_tuning_trains_every_parameter() -> None:
    assert count_trained(SHAPES, None) == 512 * 64 + 64 * 64 + 176 * 64 + 64 + 512 * 64


def test_all_linear_adapter_leaves_embeddings_head_and_norms_alone() -> None:
    assert count_trained(SHAPES, LoraOptions(r=8)) == 8 * (64 + 64) + 8 * (176 + 64)


def test_named_modules_and_modules_trained_in_full() -> None:
    lora = LoraOptions(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert count_trained(SHAPES, lora) == 8 * (64 + 64) + 512 * 64


def test_adapter_that_is_trained_on_keeps_its_size() -> None:
    shapes = {"base.q_proj.lora_A.weight": [8, 64], "base.q_proj.lora_B.weight": [64, 8]}
    assert count_trained(shapes, LoraOptions(r=16)) == 2 * 8 * 64


def test_checkpoint_holds_weights_and_two_optimizer_values() -> None:
    assert checkpoint_bytes(1000, dtype="float32") == 12_000
    assert checkpoint_bytes(1000, dtype="bfloat16") == 6_000


def test_too_little_space_says_how_much_is_needed_and_what_to_do(tmp_path: Path) -> None:
    assert require_space(tmp_path / "runs" / "a", 1024, num_checkpoints=3) > 1024
    with pytest.raises(EnvironmentProblem, match=r"3 checkpoints and the final model need about 1048576\.00 GiB; free"):
        require_space(tmp_path / "runs" / "a", 2**50, num_checkpoints=3)
