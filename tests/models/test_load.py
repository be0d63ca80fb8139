from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel

from alignkit.errors import ModelError
from alignkit.models.adapters import activate
from alignkit.models.chat import load_tokenizer
from alignkit.models.load import Loaded, build_skeleton, load_policy, load_reference, load_reward_model, load_trained
from alignkit.models.parameters import compare_probes, hash_base, take_probe
from alignkit.models.save import save_model
from alignkit.recipe.stage import Stage

MakeStage = Callable[..., Stage]
NEW, VOCABULARY = {"dropout": 0.0}, 512
PATHS = ["builtin:tiny-gpt2", "builtin:tiny-llama"]


def train_a_little(loaded: Loaded, *, reward: bool = False) -> None:
    """Two big optimizer steps on fixed tokens, so that every trainable tensor moves."""
    model = loaded.model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.5)
    ids = torch.arange(40, 72).reshape(2, 16)
    for _ in range(2):
        output = model(input_ids=ids)
        loss = output.logits.square().mean() + output.logits.mean() if reward else model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run_stage(stage: Stage, *, reward: bool = False) -> tuple[Loaded, dict[str, Any], Path]:
    """Load, train and save a stage; returns it with the probe of the trained model and its run directory."""
    run_dir = Path(stage.run_dir)
    load = load_reward_model if reward else load_policy
    loaded = load(stage, run_dir=run_dir)
    before = hash_base(loaded.model) if stage.lora else ""
    train_a_little(loaded, reward=reward)
    if stage.lora:
        assert hash_base(loaded.model) == before
    probe = take_probe(loaded.model, vocab_size=VOCABULARY, reward=reward)
    tokenizer = load_tokenizer(stage)
    save_model(loaded.model, tokenizer, run_dir / "model", lineage=loaded.lineage, precision=loaded.precision)
    return loaded, probe, run_dir


def probe_of(model: Any, *, reward: bool = False) -> dict[str, Any]:
    return take_probe(model, vocab_size=VOCABULARY, reward=reward)


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert compare_probes(first, second) is None


def assert_different(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert "differ" in (compare_probes(first, second) or "")


def assert_refused(stage: Stage, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        load_policy(stage, run_dir=Path(stage.run_dir))


def test_full_policy_is_deterministic_for_a_seed_and_leaves_the_global_generator_alone(make_stage: MakeStage) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = load_policy(make_stage(seed=3), run_dir=Path(make_stage().run_dir))
    assert torch.equal(torch.rand(1), expected)
    second = load_policy(make_stage(seed=3), run_dir=Path(make_stage().run_dir))
    other = load_policy(make_stage(seed=4), run_dir=Path(make_stage().run_dir))
    assert probe_of(first.model) == probe_of(second.model)
    assert_different(probe_of(first.model), probe_of(other.model))
    assert not isinstance(first.model, PeftModel)
    assert not (Path(make_stage().run_dir) / "base").exists()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_saved_adapter_gives_the_trained_model_back(make_stage: MakeStage, path: str, quantization: str) -> None:
    stage = make_stage(lora=NEW, path=path, quantization=quantization)
    fresh = load_policy(stage, run_dir=Path(stage.run_dir))
    with fresh.model.disable_adapter():
        base = probe_of(fresh.model)
    assert probe_of(fresh.model) == base  # B is zero
    _, trained, run_dir = run_stage(stage)
    assert_different(base, trained)
    assert_same(trained, probe_of(load_trained(run_dir, device="cpu")))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("adapter", "reference"),
    [(None, "ref_adapter"), ("continue", "ref_adapter"), ("merge", "adapter_off"), ("stack", "base_adapter")],
)
def test_dpo_starts_from_the_sft_adapter_and_never_from_the_raw_base(
    make_stage: MakeStage, path: str, quantization: str, adapter: str | None, reference: str
) -> None:
    options = {"lora": NEW, "path": path, "quantization": quantization}
    sft, trained, run_dir = run_stage(make_stage("sft", **options))
    with sft.model.disable_adapter():
        raw = probe_of(sft.model)
    stage = make_stage("dpo", start=run_dir, adapter=adapter, **options)
    started = probe_of(load_policy(stage, run_dir=Path(stage.run_dir)).model)
    if quantization == "none" or adapter != "merge":
        assert_same(trained, started)
    else:  # the merged weights are quantised again: near the sft model, far from the raw base
        far = torch.tensor(raw["values"]).sub(torch.tensor(trained["values"])).norm()
        near = torch.tensor(started["values"]).sub(torch.tensor(trained["values"])).norm()
        assert near < far / 2
    loaded, dpo, dpo_dir = run_stage(stage)
    assert loaded.reference == reference
    assert_different(started, dpo)
    assert_same(dpo, probe_of(load_trained(dpo_dir, device="cpu")))
    assert [entry["path"] for entry in loaded.lineage][0] == path


def test_reference_of_a_continued_adapter_is_a_frozen_copy_that_is_not_saved(make_stage: MakeStage) -> None:
    _, trained, run_dir = run_stage(make_stage("sft", lora=NEW))
    loaded, _, dpo_dir = run_stage(make_stage("dpo", lora=NEW, start=run_dir))
    loaded.model.set_adapter("ref")
    assert_same(trained, probe_of(loaded.model))
    loaded.model.set_adapter("default")
    frozen = [parameter for name, parameter in loaded.model.named_parameters() if ".ref." in name]
    assert frozen and not any(parameter.requires_grad for parameter in frozen)
    names = sorted(file.name for file in (dpo_dir / "model").iterdir())
    assert "ref" not in names and "README.md" not in names and "training_args.bin" not in names


def test_stacked_adapter_alone_is_the_reference_and_only_the_upper_one_trains(make_stage: MakeStage) -> None:
    _, trained, run_dir = run_stage(make_stage("sft", lora=NEW))
    loaded, _, dpo_dir = run_stage(make_stage("dpo", lora=NEW | {"r": 2}, start=run_dir, adapter="stack"))
    trainable = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    assert trainable and all(".default." in name for name in trainable)
    both = probe_of(loaded.model)
    activate(loaded.model, ["start"])
    assert_same(trained, probe_of(loaded.model))
    activate(loaded.model, ["start", "default"])
    assert probe_of(loaded.model) == both
    assert [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad] == trainable
    saved = json.loads((dpo_dir / "model" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["base_model_name_or_path"]) == (6, 6, str(run_dir / "base"))
    assert not [path for path in (dpo_dir / "model").iterdir() if path.is_dir()]


def test_stack_of_adapters_on_different_layers_is_saved_exactly(make_stage: MakeStage) -> None:
    _, _, run_dir = run_stage(make_stage("sft", lora=NEW | {"target_modules": ["c_attn"]}))
    upper = NEW | {"r": 2, "target_modules": ["c_attn", "c_fc"], "use_rslora": True}
    _, probe, dpo_dir = run_stage(make_stage("dpo", lora=upper, start=run_dir, adapter="stack"))
    assert_same(probe, probe_of(load_trained(dpo_dir, device="cpu")))
    assert_same(probe, probe_of(AutoPeftModelForCausalLM.from_pretrained(dpo_dir / "model")))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("adapter", ["continue", "merge", "stack"])
def test_reward_model_from_an_sft_adapter_keeps_its_weights_and_trains_its_head(
    make_stage: MakeStage, quantization: str, adapter: str
) -> None:
    options = {"lora": NEW, "quantization": quantization, "path": "builtin:tiny-llama"}
    sft, _, run_dir = run_stage(make_stage("sft", **options))
    stage = make_stage("rm", start=run_dir, adapter=adapter, **options)
    loaded = load_reward_model(stage, run_dir=Path(stage.run_dir))
    head = [name for name, parameter in loaded.model.named_parameters() if "score" in name and parameter.requires_grad]
    assert head == ["base_model.model.score.modules_to_save.default.weight"]
    ids = torch.arange(30, 50)[None]
    hidden = loaded.model.base_model.model.model(input_ids=ids).last_hidden_state
    expected = sft.model.base_model.model.model(input_ids=ids).last_hidden_state
    if quantization == "none" or adapter != "merge":
        torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
    _, probe, rm_dir = run_stage(stage, reward=True)
    again = load_trained(rm_dir, device="cpu", reward=True)
    assert_same(probe, probe_of(again, reward=True))
    assert again.config.pad_token_id == 509
    stage = make_stage("rm", start=rm_dir, **options | {"lora": again_shape(rm_dir)})
    assert_same(probe, probe_of(load_reward_model(stage, run_dir=rm_dir.parent / "rm2").model, reward=True))


def again_shape(run_dir: Path) -> dict[str, Any]:
    saved = json.loads((run_dir / "model" / "adapter_config.json").read_text())
    return NEW | {"r": saved["r"], "alpha": saved["lora_alpha"]}


def test_new_score_head_is_drawn_with_the_published_scale(make_stage: MakeStage) -> None:
    stage = make_stage("rm", config={"n_embd": 512}, seed=11)
    loaded = load_reward_model(stage, run_dir=Path(stage.run_dir))
    weight = loaded.model.score.weight
    assert weight.shape == (1, 512) and weight.requires_grad
    assert weight.std().item() == pytest.approx(513**-0.5, rel=0.1)
    expected = torch.randn(1, 512, generator=torch.Generator().manual_seed(11)) / 513**0.5
    assert torch.equal(weight.detach(), expected)


def test_reference_of_full_fine_tuning_is_a_second_model(make_stage: MakeStage) -> None:
    stage = make_stage("dpo")
    loaded = load_policy(stage, run_dir=Path(stage.run_dir))
    reference = load_reference(loaded)
    assert loaded.reference == "model" and reference is not None
    before = probe_of(reference)
    train_a_little(loaded)
    assert probe_of(reference) == before
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_adapter_of_a_copied_base_is_accepted_by_its_bytes(make_stage: MakeStage, tmp_path: Path) -> None:
    _, _, run_dir = run_stage(make_stage("sft"))
    original, copied = tmp_path / "original", tmp_path / "copied"
    shutil.copytree(run_dir / "model", original)
    shutil.copytree(run_dir / "model", copied)
    _, trained, adapter_dir = run_stage(make_stage("sft", lora=NEW, path=str(original)))
    moved = tmp_path / "moved"
    shutil.copytree(adapter_dir, moved)
    stage = make_stage("dpo", lora=NEW, path=str(copied), start=moved)
    assert_same(trained, probe_of(load_policy(stage, run_dir=Path(stage.run_dir)).model))


def test_runs_that_were_moved_together_find_the_base_that_one_of_them_made(
    make_stage: MakeStage, tmp_path: Path
) -> None:
    _, _, sft = run_stage(make_stage("sft", lora=NEW))
    _, dpo, trained = run_stage(make_stage("dpo", lora=NEW, start=sft))
    moved = tmp_path / "moved" / trained.name
    shutil.copytree(sft, moved.with_name(sft.name))
    shutil.copytree(trained, moved)
    shutil.rmtree(sft)
    assert_same(dpo, probe_of(load_trained(moved, device="cpu")))
    shutil.rmtree(moved.with_name(sft.name))
    with pytest.raises(ModelError, match=r"its base .*/base is gone; put it back"):
        load_trained(moved, device="cpu")


def test_run_that_was_moved_finds_its_base_beside_it(make_stage: MakeStage, tmp_path: Path) -> None:
    _, trained, run_dir = run_stage(make_stage("sft", lora=NEW))
    plain = AutoPeftModelForCausalLM.from_pretrained(run_dir / "model")  # loads with plain PEFT
    assert_same(trained, probe_of(plain))
    moved = tmp_path / "elsewhere"
    run_dir.rename(moved)
    assert_same(trained, probe_of(load_trained(moved, device="cpu")))


def test_reward_model_given_as_policy_is_refused(make_stage: MakeStage) -> None:
    for lora in (None, NEW):
        _, _, run_dir = run_stage(make_stage("rm", lora=lora), reward=True)
        stage = make_stage("dpo", lora=lora, start=run_dir)
        with pytest.raises(ModelError, match="is a reward model; dpo needs a policy"):
            load_policy(stage, run_dir=Path(stage.run_dir))
        with pytest.raises(ModelError, match="is a reward model, not a policy"):
            load_trained(run_dir, device="cpu")
        shutil.rmtree(run_dir)


@pytest.mark.parametrize(
    ("method", "options", "what"),
    [
        ("dpo", {"lora": NEW, "adapter": "stack"}, "adapter: stack has no effect"),
        ("sft", {"quantization": "nf4"}, "add lora:"),
        ("sft", {"lora": {"target_modules": ["q_proj"]}}, "lora does not fit the model: .*q_proj"),
        ("sft", {"config": {"vocab_size": 300}}, "token ids up to 511 but builtin:tiny-gpt2 has 300 embeddings"),
    ],
)
def test_what_no_base_can_give_is_refused(make_stage: MakeStage, method: str, options: Any, what: str) -> None:
    assert_refused(make_stage(method, **options), what)


def test_an_adapter_is_never_lost_changed_or_put_on_another_base(make_stage: MakeStage) -> None:
    _, trained, run_dir = run_stage(make_stage("sft", lora=NEW))
    other = {"lora": NEW, "path": "builtin:tiny-llama"}
    named = f"but the adapter in {run_dir / 'model'} has"
    remedy = "or adapter: merge or stack to train a new one"
    for options, what in (
        (other, "trained on builtin:tiny-gpt2, not on model.path builtin:tiny-llama"),
        ({"lora": NEW, "config": {"n_layer": 3}}, "was trained on builtin:tiny-gpt2 with model.config {}"),
        ({}, "add lora: to train it on, or adapter: merge"),
        ({"lora": {"r": 8, "use_rslora": True}},
         f"^tiny.yaml: lora.r is 8 {named} 4; set lora.r: 4, {remedy}\n"
         f"tiny.yaml: lora.use_rslora is True {named} False; set lora.use_rslora: False, {remedy}$"),
    ):  # fmt: skip
        assert_refused(make_stage("dpo", start=run_dir, **options), what)
    loaded = load_policy(make_stage("dpo", start=run_dir, adapter="merge"), run_dir=run_dir.parent / "dpo")
    assert_same(trained, probe_of(loaded.model))
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.reference == "model"


def test_a_saved_model_is_read_whole_and_only_its_config_is_taken_for_scratch(make_stage: MakeStage) -> None:
    from safetensors.torch import load_file, save_file

    full, _, run_dir = run_stage(make_stage("sft"))
    reward = load_reward_model(make_stage("rm", start=run_dir), run_dir=run_dir.parent / "rm").model
    assert torch.equal(reward.transformer.h[1].mlp.c_fc.weight, full.model.transformer.h[1].mlp.c_fc.weight)
    path = str(run_dir / "model")
    assert_refused(make_stage("sft", path=path, config={"n_layer": 1}), "set model.init: scratch or leave it out")
    stage = make_stage("sft", path=path, init="scratch", config={"n_layer": 1})
    model = load_policy(stage, run_dir=run_dir).model
    assert model.config.n_layer == 1 and model.config.vocab_size == VOCABULARY
    build_skeleton(make_stage("rm", path=path, init="scratch", config={"n_embd": 16}))  # other shapes than on disk
    tensors = load_file(file := run_dir / "model" / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    what = "1 tensors are missing, first transformer.h.1.mlp.c_fc.weight"
    assert_refused(make_stage("dpo", start=run_dir), what)


def test_quantized_adapters_take_the_dtype_of_computing(make_stage: MakeStage) -> None:
    for dtype in ("float32", "bfloat16"):
        stage = make_stage(lora=NEW, quantization="nf4", dtype=dtype)
        model = load_policy(stage, run_dir=Path(stage.run_dir)).model
        adapters = {parameter.dtype for name, parameter in model.named_parameters() if ".lora_" in name}
        assert adapters == {getattr(torch, dtype)}
        shutil.rmtree(stage.run_dir)
