from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from torch import nn

from alignkit.models.load import Precision, load_policy, quantization_config
from alignkit.models.parameters import compare_probes, describe_parameters, hash_base, probe_ids, take_probe
from alignkit.models.start import builtin_config, random_model
from alignkit.recipe.stage import Stage

MakeStage = Callable[..., Stage]
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "nf4.json"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


def quantize(weight: torch.Tensor, *, double: bool) -> nn.Module:
    """Quantise one matrix with the settings our recipes use."""
    config = quantization_config(Precision(torch.float32, "cpu", "nf4", double))
    layer = Linear4bit(
        *reversed(weight.shape),
        bias=False,
        compute_dtype=config.bnb_4bit_compute_dtype,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu")


def test_nf4_codes_constants_and_values_are_the_published_ones(golden: dict[str, Any]) -> None:
    weight = torch.tensor(golden["W"]).reshape(64, 64)
    state = quantize(weight, double=False).weight
    torch.testing.assert_close(state.quant_state.code, torch.tensor(golden["codebook"]), atol=1e-6, rtol=0)
    assert state.data.flatten().tolist() == golden["packed"]
    torch.testing.assert_close(state.quant_state.absmax, torch.tensor(golden["absmax"]), atol=1e-6, rtol=0)
    back = functional.dequantize_4bit(state.data, state.quant_state).flatten()
    torch.testing.assert_close(back, torch.tensor(golden["dequant"]), atol=1e-6, rtol=0)


def test_bits_per_parameter_are_measured_with_all_constants(golden: dict[str, Any]) -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(golden["big"]["seed"]))
    once, twice = quantize(weight, double=False), quantize(weight, double=True)
    assert describe_parameters(once)["bits_per_quantized_parameter"] == golden["big"]["bits_nodq"] == 4.5
    # 4 bits, 8/64 for the block constants, 32/(64*256) for theirs
    assert describe_parameters(twice)["bits_per_quantized_parameter"] == golden["big"]["bits_dq"] == 4.126953125
    for layer, key in ((once, "mse_nodq"), (twice, "mse_dq")):
        back = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert (back - weight).square().mean().item() == pytest.approx(golden["big"][key], abs=1e-6)


def test_counts_of_a_quantized_policy_are_of_weights_not_of_bytes(make_stage: MakeStage) -> None:
    stage = make_stage(lora={}, quantization="nf4")
    facts = describe_parameters(load_policy(stage, run_dir=Path(stage.run_dir)).model)
    layers = 2 * (96 * 288 + 96 * 96 + 2 * 96 * 384)  # attention in, attention out, both MLP matrices
    adapters = 2 * 4 * (96 + 288 + 96 + 96 + 2 * (96 + 384))
    assert facts["quantized"] == layers
    assert facts["trainable"] == adapters
    assert facts["total"] == 322_176 + adapters
    assert 4.127 <= facts["bits_per_quantized_parameter"] <= 4.14


def test_embeddings_and_head_are_never_quantized(make_stage: MakeStage) -> None:
    stage = make_stage(lora={}, quantization="nf4", path="builtin:tiny-llama")
    model = load_policy(stage, run_dir=Path(stage.run_dir)).model
    packed = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    assert len(packed) == 14 and not any("lm_head" in name or "embed" in name for name in packed)
    adapted = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(adapted) == 28 and not any("lm_head" in name for name in adapted)


@pytest.mark.parametrize("path", ["builtin:tiny-gpt2", "builtin:tiny-llama"])
def test_evaluating_4_bit_weights_changes_neither_their_bytes_nor_the_gradient(
    path: str, make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(lora={}, quantization="nf4", path=path)
    ids = torch.arange(32).reshape(2, 16)
    seen = []
    for avx512bf16 in (False, True):  # what decides whether bitsandbytes repacks; most machines know one answer
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda answer=avx512bf16: answer)
        model = load_policy(stage, run_dir=Path(stage.run_dir)).model
        before = hash_base(model)
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        model.train()(input_ids=ids, labels=ids).loss.backward()
        assert hash_base(model) == before
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        seen.append({"base": before, "logits": logits.tolist()} | {k: g.tolist() for k, g in gradients.items()})
    assert len(gradients) == (28 if "llama" in path else 16)
    assert seen[0] == seen[1]


def test_base_hash_sees_a_changed_code_and_a_changed_constant_but_no_adapter(make_stage: MakeStage) -> None:
    stage = make_stage(lora={}, quantization="nf4")
    model = load_policy(stage, run_dir=Path(stage.run_dir)).model
    before = hash_base(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert hash_base(model) == before
    weight = next(parameter for parameter in model.parameters() if parameter.dtype == torch.uint8)
    weight.quant_state.absmax[0] += 1
    changed = hash_base(model)
    assert changed != before
    weight.quant_state.absmax[0] -= 1
    assert hash_base(model) == before
    weight.data[0] ^= 1
    assert hash_base(model) not in (before, changed)


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return random_model(builtin_config("builtin:tiny-gpt2"), seed=seed, dtype=dtype)


def test_probe_rows_stay_away_from_both_ends_of_any_vocabulary() -> None:
    for size in (512, 50_257, 128_256):
        ids = probe_ids(size)
        assert ids.shape == (2, 16) and ids.min() >= size // 8 and ids.max() < size // 2
        assert len(ids.unique()) == 32


def test_probe_holds_the_logits_and_leaves_the_mode_alone() -> None:
    model = tiny().train()
    probe = take_probe(model, vocab_size=512, reward=False)
    assert model.training and len(probe["values"]) == 2 * 4 * 16
    logits = model.eval()(input_ids=probe_ids(512)).logits
    assert probe["values"][0] == logits[0, 3, 0].item()
    assert probe["values"][-1] == logits[1, 15, 480].item()
    assert (probe["dtype"], probe["quantization"], probe["reward"]) == ("float32", "none", False)


def test_probes_of_other_weights_kinds_and_sizes_are_told_apart() -> None:
    first = take_probe(tiny(), vocab_size=512, reward=False)
    assert compare_probes(first, take_probe(tiny(), vocab_size=512, reward=False)) is None
    reason = compare_probes(first, take_probe(tiny(1), vocab_size=512, reward=False))
    assert reason is not None and reason.startswith("its outputs differ by up to ")
    moved = first | {"values": [value + 0.001 for value in first["values"]]}  # seen in float32, forgiven in bfloat16
    assert compare_probes(first, moved) is not None
    assert compare_probes(first | {"dtype": "bfloat16"}, moved) is None
    broken = first | {"values": [float("nan"), *first["values"][1:]]}
    for changed, what in (
        (first | {"reward": True}, "it was a policy and is a reward model"),
        (first | {"values": [0.0]}, "the probe has 1 values, not 128"),
        (broken, "it computes values that are not finite"),
    ):
        assert compare_probes(first, changed) == what
