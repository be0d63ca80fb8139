"""What a stage's config, adapter and `lora:` are found to be before any weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, MixtralConfig, Phi3Config

from alignkit.errors import EnvironmentProblem, ModelError
from alignkit.models.generation import generate_answers
from alignkit.models.load import build_skeleton, load_policy, load_reward_model, load_trained, pick_precision
from alignkit.models.parameters import take_probe
from alignkit.models.save import save_model
from alignkit.models.start import builtin_tokenizer
from alignkit.recipe.schema import LaunchOptions
from alignkit.recipe.stage import Stage

MakeStage = Callable[..., Stage]
SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 508, "eos_token_id": 508, "pad_token_id": 509,
}  # fmt: skip
CONFIGS = {
    "phi3": Phi3Config(**SIZES), "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "granite": GraniteConfig(**SIZES),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        builtin_tokenizer().save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    ("model", "lora", "message"),
    [
        ("phi3", {"target_modules": ["q_proj", "o_proj"]}, "lora.target_modules names q_proj: nothing in the model; "
         "the model has down_proj, embed_tokens, gate_up_proj, lm_head, o_proj, qkv_proj"),
        ("phi3", {"target_modules": r".*\.(o_proj|qkv_porj)"}, "lora.target_modules names qkv_porj: nothing"),
        ("phi3", {"target_modules": "(o_proj"}, "lora does not fit the model: "),
        ("phi3", {"modules_to_save": ["lm_haed"]}, "lora.modules_to_save names lm_haed: nothing"),
        ("mixtral", {"target_modules": ["q_proj", "gate_up_proj"]}, "lora.target_modules names gate_up_proj: nothing "
         "in the model; the model has embed_tokens, k_proj, lm_head, o_proj, q_proj, v_proj; its experts' down_proj, "
         "gate_up_proj are parameters"),
        ("mixtral", {"dropout": 0.1}, "set lora.dropout: 0 or name layers without experts"),
    ],
)  # fmt: skip
def test_names_that_match_nothing_are_refused_with_those_that_exist(
    model: str, lora: dict, message: str, models: Path, make_stage: MakeStage
) -> None:
    stage = make_stage(path=str(models / model), lora=lora)
    for find in (build_skeleton, lambda stage: load_policy(stage, run_dir=Path(stage.run_dir))):
        with pytest.raises(ModelError) as caught:
            find(stage)
        assert message in str(caught.value)


def test_counts_are_those_of_the_loaded_model_and_experts_left_out_are_said(
    models: Path, make_stage: MakeStage
) -> None:
    for lora in (None, {"target_modules": "all-linear"}, {"target_modules": ["q_proj"]}):
        stage = make_stage(path=str(models / "mixtral"), lora=lora)
        model = load_policy(stage, run_dir=Path(stage.run_dir)).model
        skeleton = build_skeleton(stage)
        assert skeleton.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        doubts = ["no adapter reaches the experts' down_proj, gate_up_proj, 55.6% of the weights"]
        assert skeleton.doubts == (doubts if lora == {"target_modules": ["q_proj"]} else [])
    (doubt,) = build_skeleton(make_stage(path=str(models / "mixtral"), lora={}, quantization="nf4")).doubts
    # q and o 32 x 32, k and v 32 x 16, in two layers: 6,144 of 88,480 weights
    assert doubt.startswith("model.quantization nf4 holds 6.9% of the weights") and "gate_up_proj" in doubt


def test_settings_that_a_stage_does_not_use_are_noted(models: Path, make_stage: MakeStage, tmp_path: Path) -> None:
    base = shutil.copytree(models / "phi3", tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.6, "repetition_penalty": 1.1}')
    kept = "the base's generation_config.json (temperature, repetition_penalty): the saved model keeps it"
    off = "lora.dropout 0.1: METHOD switches dropout off (disable_dropout)"
    for method, notes in (("sft", [kept]), ("dpo", [off, kept]), ("rm", [off])):
        skeleton = build_skeleton(make_stage(method, path=str(base), lora={"dropout": 0.1}))
        assert sorted(skeleton.notes) == sorted(note.replace("METHOD", method) for note in notes)
    assert build_skeleton(make_stage(path=str(models / "phi3"), lora={})).notes == []


def test_a_loss_that_depends_on_the_forward_pass_is_said(make_stage: MakeStage) -> None:
    stage = make_stage("dpo")
    for trainer, micro, said in (({"loss_type": ["aot"]}, 8, 1), ({"loss_type": ["aot"]}, 16, 0), ({}, 8, 0)):
        options = stage.options.model_copy(update={"batch_size": 16, "micro_batch_size": micro})
        doubts = build_skeleton(replace(stage, trainer=trainer, options=options)).doubts
        assert len(doubts) == said and all("micro_batch_size: 16 in one process" in doubt for doubt in doubts)


def test_a_model_without_a_classifier_class_is_trained_and_read_as_a_reward_model(
    models: Path, make_stage: MakeStage, tmp_path: Path
) -> None:
    for lora in (None, {}):
        stage = make_stage("rm", path=str(models / "granite"), lora=lora)
        loaded = load_reward_model(stage, run_dir=tmp_path)
        assert build_skeleton(stage).num_trained == sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
        save_model(loaded.model, builtin_tokenizer(), tmp_path / "model", precision=loaded.precision)
        again = load_trained(tmp_path / "model", device="cpu", reward=True)
        probes = [take_probe(model, vocab_size=512, reward=True)["values"] for model in (loaded.model, again)]
        assert probes[0] == pytest.approx(probes[1], abs=1e-6) and len(set(probes[0])) > 1


def test_a_reward_model_leaves_the_lm_head_of_a_policys_adapter_behind(
    models: Path, make_stage: MakeStage, tmp_path: Path
) -> None:
    lora = {"modules_to_save": ["lm_head"]}
    stage = make_stage("sft", path=str(models / "granite"), lora=lora)
    loaded = load_policy(stage, run_dir=tmp_path)
    save_model(loaded.model, builtin_tokenizer(), tmp_path / "sft", precision=loaded.precision)
    again = make_stage("rm", path=str(models / "granite"), lora={"modules_to_save": []}, start=tmp_path / "sft")
    model = load_reward_model(again, run_dir=tmp_path).model
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad and "lora" not in name} == {
        "default"
    }
    assert not any("lm_head" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"hidden_size": 10**9}, "hidden_size is 1000000000; it must be a whole number from 1 to 1,048"),
        ("config.json", {"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000; it must be"),
        ("config.json", {"vocab_size": -1}, "vocab_size is -1; it must be"),
        ("config.json", {"intermediate_size": 60}, "promises other shapes than the weights have"),
        ("config.json", {"num_attention_heads": 3}, "config.json"),
        ("generation_config.json", {"temperature": -5, "top_k": "x"}, "temperature is -5, top_k is 'x'"),
    ],
)
def test_a_config_that_makes_no_model_is_refused_by_file(
    file: str, changes: dict, message: str, models: Path, make_stage: MakeStage, tmp_path: Path
) -> None:
    odd = Path(shutil.copytree(models / "phi3", tmp_path / "odd"))
    written = json.loads((odd / file).read_text()) if (odd / file).exists() else {}
    (odd / file).write_text(json.dumps(written | changes))
    with pytest.raises(ModelError) as caught:
        build_skeleton(make_stage(path=str(odd)))
    assert message in str(caught.value) and str(odd / file) in str(caught.value)


def test_a_quantised_base_needs_its_package(models: Path, make_stage: MakeStage, tmp_path: Path) -> None:
    base = Path(shutil.copytree(models / "phi3", tmp_path / "gptq"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(EnvironmentProblem, match="quantised weights that cannot be used here"):
        build_skeleton(make_stage(path=str(base), lora={}))


def test_answers_of_a_mixture_of_experts_leave_the_routers_loss_alone(models: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(models / "mixtral")
    model.config.output_router_logits = True
    with torch.no_grad():
        assert generate_answers(model, [[1, 2, 3], [4]], max_new_tokens=3, eos_ids=[508], pad_id=509)
    assert model.config.output_router_logits


def test_what_only_a_card_can_do_is_refused_on_the_cpu_before_any_weight_is_read(make_stage: MakeStage) -> None:
    stage = replace(make_stage(), trainer={"activation_offloading": True}, launch=LaunchOptions(device="cpu"))
    with pytest.raises(
        EnvironmentProblem, match=r"sft\.activation_offloading moves them to the CPU, which this runs on"
    ):
        pick_precision(stage)
