"""Every type of adapter: trained, saved, read by the next stage and by a reader, merged, and resumed exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkit.errors import ModelError, RecipeError
from alignkit.launch.run import launch_stage
from alignkit.models.adapters import START, TRAINED, activate, begin_by_data
from alignkit.models.load import build_skeleton, load_policy, load_trained
from alignkit.models.parameters import hash_base, take_probe
from alignkit.models.save import merge
from alignkit.models.start import builtin_tokenizer
from alignkit.runs.directory import RunDir

ROWS = "data: {path: builtin:instructions, max_rows: 16}"
PAIRS = "data: {path: builtin:preferences, max_rows: 16}"
SHORT = "batch_size: 4, max_steps: 2, learning_rate: 3e-2, warmup_steps: 0, samples: {num: 0}"
TYPES = {
    "dora": "{adapter_type: dora, r: 4}",
    "vera": "{adapter_type: vera, r: 16, d_initial: 0.5}",
    "oft": "{adapter_type: oft, oft_block_size: 16}",
    "ia3": "{adapter_type: ia3, target_modules: [k_proj, v_proj, down_proj], feedforward_modules: [down_proj]}",
    "pissa": "{r: 4, init_lora_weights: pissa}",
    "pissa_niter_4": "{r: 4, init_lora_weights: pissa_niter_4, use_rslora: true}",
    "olora": "{r: 4, init_lora_weights: olora}",
    "gaussian": "{r: 4, init_lora_weights: gaussian, rank_pattern: {q_proj: 2}, alpha_pattern: {q_proj: 9}}",
    "eva": "{r: 4, init_lora_weights: eva}",
    "orthogonal": "{r: 4, init_lora_weights: orthogonal, layers_to_transform: [1], exclude_modules: [o_proj]}",
}


def write_recipe(lora: str, *more: str, model: str = "path: builtin:tiny-llama") -> str:
    return "\n".join([f"name: t\nmodel: {{{model}}}\nlora: {lora}", f"sft: {{{ROWS}, {SHORT}}}", *more])


def probe(model: Any) -> torch.Tensor:
    return torch.tensor(take_probe(model, vocab_size=512, reward=False)["values"])


def build(stage: Any, tmp_path: Path) -> Any:
    import importlib

    run = RunDir(tmp_path / "built")
    run.path.mkdir(exist_ok=True)
    return importlib.import_module(f"alignkit.train.{stage.method}").build(stage, run).trainer


OFTEN = ("vera", "oft", "ia3", "pissa", "eva", "orthogonal")


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in TYPES]
)
def test_an_adapter_of_each_type_is_trained_saved_gone_on_from_and_merged(
    name: str, make_stage: Callable, tmp_path: Path
) -> None:
    text = write_recipe(TYPES[name], f"dpo: {{start_from: sft, {PAIRS}, {SHORT}}}")
    stage = make_stage(text, "sft")
    fresh = load_policy(stage, run_dir=tmp_path / "fresh").model
    with fresh.disable_adapter():
        base = probe(fresh)
    if START in fresh.peft_config:
        activate(fresh, [START, TRAINED])
    torch.testing.assert_close(probe(fresh), base, rtol=0, atol=2e-5)  # a new adapter changes nothing
    launch_stage(stage)  # reads back what it has saved, and compares
    tuned = probe(load_trained(tmp_path / "runs/t/sft/model", device="cpu"))
    assert (tuned - base).abs().max() > 1e-3
    trainer = build(make_stage(text, "dpo"), tmp_path)  # the adapter goes on, and its copy is the reference
    torch.testing.assert_close(probe(trainer.model), tuned, rtol=0, atol=2e-5)
    trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    before = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    torch.testing.assert_close(torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)), before)
    assert (probe(trainer.model) - tuned).abs().max() > 1e-3  # the policy is active again
    launch_stage(make_stage(text, "dpo"))
    merge(tmp_path / "runs/t/sft", tmp_path / "merged")  # compares the merged model with the adapted one
    torch.testing.assert_close(probe(load_trained(tmp_path / "merged", device="cpu")), tuned, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["vera", "pissa"])
def test_a_stopped_run_ends_with_the_same_bits(name: str, make_stage: Callable, resume_exactly: Callable) -> None:
    resume_exactly(make_stage(write_recipe(TYPES[name]), "sft", "sft.save_steps=1", "lora.dropout=0.1"))


def test_parts_of_the_weights_are_those_of_peft_and_the_base_stays_whole(make_stage: Callable, tmp_path: Path) -> None:
    """PEFT itself takes the parts off the base: what is left there, plus the trained part, is what we compute."""
    from peft import LoraConfig, get_peft_model

    stage = make_stage(write_recipe(TYPES["pissa"]), "sft")
    ours = load_policy(stage, run_dir=tmp_path).model
    before = hash_base(ours)
    again = load_policy(stage, run_dir=tmp_path).model  # the base is read, and the parts
    plain = again.unload()
    theirs = get_peft_model(
        plain, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa")
    )
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.data *= 1.5
    torch.testing.assert_close(probe(ours), probe(theirs), rtol=0, atol=1e-4)
    assert hash_base(ours) == before
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert trained and all(".default." in name for name in trained)


def test_loftq_begins_as_what_the_base_has_lost(make_stage: Callable, tmp_path: Path) -> None:
    text = write_recipe("{r: 8, init_lora_weights: loftq}", model="path: builtin:tiny-llama, quantization: nf4")
    model = load_policy(make_stage(text, "sft"), run_dir=tmp_path).model
    full = probe(load_trained(tmp_path / "base", device="cpu"))
    with model.disable_adapter():
        lost = (probe(model) - full).norm()
    assert (probe(model) - full).norm() < 0.8 * lost
    launch_stage(make_stage(text, "sft"))
    with pytest.raises(ModelError, match="loftq"):
        merge(tmp_path / "runs/t/sft", tmp_path / "merged")


def test_eva_begins_along_what_varies_most_in_the_inputs(make_stage: Callable, tmp_path: Path) -> None:
    trainer = build(make_stage(write_recipe(TYPES["eva"]), "sft"), tmp_path)
    before = probe(trainer.model)
    begin_by_data(trainer.model, islice(trainer.get_train_dataloader(), 4))
    torch.testing.assert_close(probe(trainer.model), before, rtol=0, atol=1e-5)
    found = [weight for name, weight in trainer.model.named_parameters() if ".lora_A." in name]
    for weight in found:  # principal directions
        torch.testing.assert_close(weight @ weight.T, torch.eye(4), rtol=0, atol=1e-3)
        assert weight.requires_grad
    assert len(found) == 14


def test_new_tokens_have_rows_that_are_trained_saved_and_kept(
    make_stage: Callable, write_rows: Callable, tmp_path: Path
) -> None:
    launch_stage(make_stage(f"name: b\nmodel: {{path: builtin:tiny-llama}}\nsft: {{{ROWS}, {SHORT}}}", "sft"))
    rows = [{"prompt": f"<ask> {n}", "completion": f"<say> {n}"} for n in range(8)]
    write_rows(rows)
    for lora in ("lora: {r: 4}", ""):
        text = (
            f"name: t{len(lora)}\nmodel: {{path: runs/b/sft, add_tokens: [<ask>, <say>]}}\n{lora}\n"
            f"sft: {{data: rows.jsonl, {SHORT}}}\ndpo: {{start_from: sft, {PAIRS}, {SHORT}}}"
        )
        stage = make_stage(text, "sft")
        fresh = load_policy(stage, run_dir=tmp_path / f"fresh{len(lora)}").model
        base = fresh.get_base_model() if lora else fresh
        before = [layer.weight.detach() for layer in (base.get_input_embeddings(), base.get_output_embeddings())]
        for weight in before:
            assert len(weight) == 514
            torch.testing.assert_close(weight[512], weight[:512].mean(dim=0), rtol=0, atol=1e-6)
        launch_stage(stage)
        directory = tmp_path / stage.run_dir / "model"
        model = load_trained(directory, device="cpu")
        base = model.get_base_model() if lora else model
        after = [layer.weight.detach() for layer in (base.get_input_embeddings(), base.get_output_embeddings())]
        for old, new in zip(before, after, strict=True):
            assert (new[512:] - old[512:]).abs().min(dim=1).values.max() > 1e-4  # both rows, of both matrices
            assert not lora or torch.equal(new[:512], old[:512])
        assert json.loads((directory / "tokenizer_config.json").read_text())
        launch_stage(make_stage(text, "dpo"))
        merged = tmp_path / f"merged{len(lora)}"
        if lora:
            merge(tmp_path / stage.run_dir, merged)
            torch.testing.assert_close(
                probe(load_trained(merged, device="cpu")),
                probe(load_trained(directory, device="cpu")),
                rtol=0,
                atol=1e-4,
            )


def test_experts_and_rows_of_tokens_are_adapted_as_by_hand(make_stage: Callable, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    base = MixtralForCausalLM(MixtralConfig(vocab_size=512, num_hidden_layers=1, num_local_experts=4, **sizes)).eval()
    base.save_pretrained(tmp_path / "moe")
    builtin_tokenizer().save_pretrained(tmp_path / "moe")
    keys = "target_modules: [q_proj], target_parameters: [experts.down_proj], trainable_token_indices: [3, 7]"
    stage = make_stage(write_recipe(f"{{r: 2, alpha: 6, {keys}}}", model=f"path: {tmp_path}/moe"), "sft")
    model = load_policy(stage, run_dir=tmp_path / "adapted").model.eval()
    ids = torch.tensor([[1, 3, 5, 7, 9]])
    torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits, rtol=0, atol=1e-6)
    rows = torch.linspace(-1, 1, 32).view(2, 16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name and "lora_" in name:
                parameter.fill_(0.01 if "lora_A" in name else 0.5)
            elif "trainable_tokens_delta" in name:
                parameter.copy_(rows)
        base.model.layers[0].mlp.experts.down_proj += 0.03  # alpha / r x (r x 0.5 x 0.01), in each of the four experts
        base.model.embed_tokens.weight[[3, 7]] = rows
    torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits, rtol=0, atol=1e-5)
    trained = {name.split(".")[-3] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B", "token_adapter"}


def test_b_learns_faster_than_a(make_stage: Callable, tmp_path: Path) -> None:
    text = write_recipe("{r: 4, lora_plus_ratio: 16, modules_to_save: [lm_head]}")
    stage = make_stage(text, "sft", "sft.weight_decay=0.1", "sft.learning_rate=1e-3")
    trainer = build(stage, tmp_path)
    trainer.lora_plus_ratio = stage.lora.lora_plus_ratio
    optimizer = trainer.create_optimizer()
    name_of = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    found = {(group["lr"], group["weight_decay"]): {name_of[id(p)].split(".")[-3] for p in group["params"]}
             for group in optimizer.param_groups}  # fmt: skip
    assert found == {(1e-3, 0.1): {"lora_A", "modules_to_save"}, (1.6e-2, 0.1): {"lora_B"}}
    launch_stage(stage)


def test_frozen_weights_stay_and_all_others_are_trained(make_stage: Callable, tmp_path: Path) -> None:
    text = "name: t\nmodel: {path: builtin:tiny-llama, save_dtype: bfloat16, freeze: [embed_tokens, 'layers\\.0\\.']}\n"
    text += f"sft: {{{ROWS}, {SHORT}}}"
    stage = make_stage(text, "sft")
    start = {name: weight.detach() for name, weight in load_policy(stage, run_dir=tmp_path).model.named_parameters()}
    launch_stage(stage)
    saved = load_file(tmp_path / "runs/t/sft/model/model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "runs/t/sft/model/config.json").read_text())["dtype"] == "bfloat16"
    frozen = {name for name in start if "embed_tokens" in name or "layers.0." in name}
    assert {name for name in start if torch.equal(saved[name], start[name].bfloat16())} == frozen
    facts = json.loads((tmp_path / "runs/t/sft/stage.json").read_text())["parameters"]
    assert facts["trainable"] == sum(weight.numel() for name, weight in start.items() if name not in frozen)
    with pytest.raises(ModelError, match=r"model.freeze: wte is found in the name of no weight; there are model.embed"):
        build_skeleton(make_stage(text.replace("embed_tokens", "wte"), "sft"))


REFUSED = [
    ("lora: {adapter_type: vera, alpha: 8}", "lora.alpha has no effect with adapter_type: vera; lora and dora read it"),
    ("lora: {coft: true}", "lora.coft has no effect with adapter_type: lora; oft read it"),
    ("lora: {adapter_type: lokr}", "lora.adapter_type is lokr; it must be one of lora, dora, vera, oft, ia3"),
    ("lora: {rank_patern: {}}", "lora.rank_patern is not a key of lora; did you mean rank_pattern?"),
    ("lora: {layers_to_transform: all}", "lora.layers_to_transform is all; it must be a list or a whole number"),
    ("lora: {init_lora_weights: piss}", "lora.init_lora_weights is piss; it must be one of gaussian, "),
    ("lora: {init_lora_weights: loftq}", "lora.init_lora_weights is loftq, which makes good what a base of "),
    ("lora: {init_lora_weights: pissa, use_dora: true}", "lora.init_lora_weights is pissa, which needs model.quant"),
    ("lora: {}\nmodel.freeze: [x]", "model.freeze has no effect with lora:"),
    ("lora: {adapter_type: ia3, lora_plus_ratio: 4}", "lora.lora_plus_ratio has no effect with adapter_type: ia3"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED)
def test_keys_of_adapters_are_honoured_or_refused(text: str, said: str, make_stage: Callable) -> None:
    lora, _, model = text.partition("model.")
    more = f", {model}" if model else ""
    with pytest.raises(RecipeError) as caught:
        make_stage(f"model: {{path: builtin:tiny-llama{more}}}\n{lora}\nsft: {{{ROWS}}}", "sft")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (
            "{rank_pattern: {q_porj: 2}}",
            "lora.rank_pattern names q_porj: nothing in the model; the model has down_proj",
        ),
        ("{exclude_modules: [lm_haed]}", "lora.exclude_modules names lm_haed: nothing"),
        ("{layers_to_transform: [1, 7]}", "lora.layers_to_transform names 7: nothing"),
        ("{init_lora_weights: orthogonal, r: 3}", "lora does not fit the model: Orthogonal initialization requires"),
        ("{adapter_type: oft, oft_block_size: 7}", "lora.oft_block_size is 7, which does not divide the inputs of"),
        ("{adapter_type: oft, r: 4, oft_block_size: 16}", "lora does not fit the model: "),
    ],
)
def test_values_that_do_not_fit_the_model_are_refused(lora: str, said: str, make_stage: Callable) -> None:
    with pytest.raises(ModelError) as caught:
        build_skeleton(make_stage(write_recipe(lora), "sft"))
    assert said in str(caught.value)


def test_an_adapter_of_another_type_is_refused_by_the_next_stage(make_stage: Callable) -> None:
    text = write_recipe(TYPES["vera"], f"dpo: {{start_from: sft, {PAIRS}, {SHORT}, adapter: continue}}")
    launch_stage(make_stage(text, "sft"))
    ppo = "ppo: {start_from: sft, data: {path: builtin:prompts, max_rows: 8}, reward: builtin:true-reward}"
    for stage, overrides, said in (
        ("dpo", ["lora={r: 4}"], "lora.adapter_type is lora but the adapter in runs/t/sft/model has vera"),
        ("dpo", ["dpo.adapter=stack", "lora={}"], "adapter: stack adds two low-rank updates"),
        ("ppo", [], "the roles of ppo are LoRA adapters of one base"),
    ):
        with pytest.raises(ModelError, match=said):
            launch_stage(make_stage(f"{text}\n{ppo}", stage, *overrides))


@pytest.mark.slow
def test_fsdp_takes_a_4_bit_base_apart_where_all_is_of_one_dtype(tmp_path: Path, run_alignkit: Callable) -> None:
    for processes, strategy in ((1, "ddp"), (2, "fsdp")):
        recipe = tmp_path / f"p{processes}.yaml"
        recipe.write_text(
            "model: {path: builtin:tiny-llama, quantization: nf4, dtype: float32, quantization_storage: float32}\n"
            f"lora: {{r: 4}}\nlaunch: {{device: cpu, processes: {processes}, strategy: {strategy}}}\n"
            f"sft: {{{ROWS}, {SHORT}}}"
        )
        done = run_alignkit("sft", "-r", str(recipe))  # hashes the base before and after
        assert done.returncode == 0, done.stderr
    whole, apart = (load_file(tmp_path / f"runs/p{n}/sft/model/adapter_model.safetensors") for n in (1, 2))
    assert whole.keys() == apart.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(apart[name], tensor, rtol=0, atol=2e-4)
