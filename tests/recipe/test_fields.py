"""The committed snapshot of TRL's fields is what the installed TRL says, and every field is decided about."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import RecipeError
from alignkit.recipe import load_recipe
from alignkit.recipe.check import check_field, describe_unknown_in_stage
from alignkit.recipe.methods import OPTIONS
from alignkit.recipe.schema import DataSource, EvaluateOptions, LaunchOptions, LoraOptions, ModelOptions, RecipeOptions
from alignkit.recipe.words import OWN, controlled_fields, find_method, find_word, method_fields, read_words, trl_fields
from alignkit.recipe.yaml import Node, Origin

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def snapshot() -> Any:
    spec = importlib.util.spec_from_file_location("snapshot", REPOSITORY / "tests" / "snapshot.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_snapshots_are_what_the_installed_libraries_say(snapshot: Any) -> None:
    """Word for word with the versions they were taken from; names, types, defaults and choices with every one."""
    for file, take in ((snapshot.TARGET, snapshot.take_snapshot), (snapshot.ADAPTERS, snapshot.take_adapters)):
        kept, taken = json.loads(file.read_text(encoding="utf-8")), json.loads(snapshot.render(take()))
        if taken["versions"] != kept["versions"]:
            kept, taken = _without_help(kept), _without_help(taken)
        assert kept == taken, f"{file.name}: run `make snapshot` and look at the difference"


def _without_help(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_help(value) for key, value in node.items() if key not in ("description", "versions")}
    return node


def test_every_loss_of_trls_dpo_trainer_is_a_choice() -> None:
    """The choices come from a help text; the trainer's own comparisons are the truth."""
    import inspect

    from trl import DPOTrainer, KTOTrainer

    for trainer, config in ((DPOTrainer, "dpo"), (KTOTrainer, "kto")):
        compared = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(trainer)))
        fragment = trl_fields(config)["loss_type"]
        assert compared == set(fragment.get("items", fragment)["enum"])


def test_no_field_is_both_alignkits_and_trls() -> None:
    for method, options in OPTIONS.items():
        assert set(options.model_fields) & set(method_fields(method)) == set()
        assert set(RecipeOptions.model_fields) & set(method_fields(method)) == set()


def test_controlled_fields_exist_and_other_words_do_not() -> None:
    fields = {name for config in ("sft", "rm", "dpo", "kto") for name in trl_fields(config)}
    ppo = set(trl_fields("ppo"))
    words = [word for word in read_words() if word.tool in ("", "trl") and word.action != "method"]
    moved = {(name, word.method) for word in words if word.tool == "" for name in word.names.split()}
    assert controlled_fields("sft") - fields == set()
    assert {*(controlled_fields("ppo") - controlled_fields("sft")), *OWN} - ppo == set()
    assert {name for name, method in moved if name in (ppo if method else fields)} == set()
    assert {name for name, method in moved if method} & set(OPTIONS["ppo"].model_fields) == set()


def test_every_field_of_grpo_is_a_key_or_says_what_to_write_instead() -> None:
    """What GRPO has beyond the fields of all trainers is decided about, name by name."""
    decided = {*controlled_fields("ppo"), *OWN, *method_fields("sft")}
    left = set(trl_fields("ppo")) - decided
    assert left == {"cache_implementation"}


def test_the_table_of_words_names_keys_that_exist_and_no_word_twice() -> None:
    known = {name for method in OPTIONS for name in (*method_fields(method), *OPTIONS[method].model_fields)}
    known |= {*RecipeOptions.model_fields}
    sections = {
        "model": ModelOptions,
        "lora": LoraOptions,
        "launch": LaunchOptions,
        "data": DataSource,
        "evaluate": EvaluateOptions,
    }
    for word in read_words():
        assert word.action in ("renamed", "converted", "automatic", "refused", "missing", "method")
        assert word.key or word.said
        first, *rest = word.key.split(".")
        assert first in (OPTIONS if word.action == "method" and first else {*known, ""}), word
        assert not rest or first not in sections or rest[0] in sections[first].model_fields, word
    named = [
        (name, w.tool not in ("", "trl") and w.tool, w.action == "method" or w.method)
        for w in read_words()
        for name in w.names.split()
    ]
    assert len(named) == len(set(named))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lora_rank: 8", "it is lora.r; write lora: {r: 8}"),
        ("lora_target: all", "write lora: {target_modules: all-linear}"),
        ("pissa_init: true", "write lora: {init_lora_weights: pissa}"),
        ("loraplus_lr_ratio: 16", "write lora: {lora_plus_ratio: 16}"),
        ("peft_layers_to_transform: [0, 1]", "write lora: {layers_to_transform: [0, 1]}"),
        ("finetuning_type: dora", "write lora: {adapter_type: dora}"),
        ("vera_rank: 64", "write lora: {r: 64}"),
        ("new_special_tokens: [<a>]", 'write model: {add_tokens: ["<a>"]}'),
        ("freeze_parameters: [embed]", "it is model.freeze: regular expressions"),
        ("bnb_4bit_quant_storage: bfloat16", "write model: {quantization_storage: bfloat16}"),
        ("sample_packing: true", "it is packing; write packing: true"),
        ("template: llama3", "write model: {chat_template: llama3}"),
        ("template: qwen", "it is model.chat_template"),
        ("max_samples: 100", "write data: {max_rows: 100}"),
        ("torch_dtype: bf16", "write model: {dtype: bfloat16}"),
        ("bf16: true", "write model: {dtype: bfloat16}"),
        ("load_in_4bit: true", "write model: {quantization: nf4}"),
        ("deepspeed: zero3", "write launch: {strategy: zero3}"),
        ("per_device_train_batch_size: 4", "set batch_size (over all devices)"),
        ("warmup_ratio: 0.1", "write warmup_steps: 0.1"),
        ("min_lr_rate: 0.1", "write lr_scheduler_kwargs: {min_lr_rate: 0.1}"),
        ("stage: sft", "the section's name says the method"),
        ("loss.label_smoothing: 0.1", "label_smoothing belongs in the dpo stage"),
        ("lr_scheduler._component_: x.get_cosine", "it is lr_scheduler_type"),
        ("profiler.warmup_steps: 2", "nothing is profiled"),
        ("ckpt.path: out", "the run directory is runs/NAME/STAGE"),
        ("stage: kto", "write `dpo:` with loss_type: kto"),
        ("rl: simpo", "write `dpo:` with loss_type: simpo"),
        ("compile: true", "it is torch_compile"),
        ("evals_per_epoch: 4", "write eval_steps: 0.25"),
        ("liger_rope: true", "kernels are those of the installed libraries"),
        ("tensor_parallel_size: 4", "no layer over several devices"),
        ("cp_size: 2", "set launch.strategy: fsdp or zero3 with activation_checkpointing: true"),
        ("num_virtual_tokens: 8", "no tokens are trained before the text"),
        ("flash_attn: fa2", "write model: {attn_implementation: flash_attention_2}"),
        ("kl_estimator: k3", "write kl_in: loss"),
        ("vllm_mode: colocate", "write generation: {mode: colocate}"),
        ("fsdp_use_orig_params: true", "is picked"),
        ("actor: {adam: {lr: 1e-6}, num_nodes: 2}", "actor.adam.lr: it is learning_rate; write learning_rate: 1e-06;"),
        ("qat: {group_size: 32}", "no training with simulated quantisation"),
    ],
)
def test_words_of_other_tools_are_answered_with_ours(tmp_path: Path, given: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    for place in ("\n{given}", "\nsft: {{data: builtin:instructions, {given}}}"):
        path.write_text("model: {path: builtin:tiny-gpt2}" + place.format(given=given))
        with pytest.raises(RecipeError, match=re.escape(said)):
            load_recipe(path)


def test_a_key_of_ours_below_a_section_of_another_tool() -> None:
    given = Node(0.1, Origin("x", Path()))
    said = describe_unknown_in_stage("training.weight_decay", given, stage="sft", method="sft")
    assert said == "sft.training.weight_decay is not a key of a stage: it is weight_decay; write weight_decay: 0.1"


def test_the_name_of_another_method_is_no_slip_of_the_pen(tmp_path: Path) -> None:
    """`cpo` is two letters from `ppo`, and another method: what is known is told, and not the nearest loss."""
    names = [name for word in read_words() if word.action == "method" for name in word.names.split()]
    losses = method_fields("dpo")["loss_type"]["anyOf"][0]["enum"]
    path = tmp_path / "recipe.yaml"
    for name in {*names} - {*losses}:
        path.write_text(f"model: {{path: builtin:tiny-gpt2}}\ndpo: {{data: builtin:preferences, loss_type: {name}}}")
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        known = find_method(name)
        assert known is not None and str(caught.value).endswith(known.said), name
        assert "did you mean" not in str(caught.value)


def test_the_value_is_written_only_where_our_key_takes_it() -> None:
    for name, value in (("val_set_size", 500), ("finetuning_type", "full"), ("deepspeed", "ds_z3.json")):
        word = find_word(name)
        assert word is not None
        said = describe_unknown_in_stage(name, Node(value, Origin("x", Path())), stage="sft", method="sft")
        assert said.endswith(word.say()), said


def test_defaults_of_trl_pass_their_own_checks() -> None:
    def node(value: Any) -> Node:
        inner = [node(item) for item in value] if isinstance(value, list) else value
        return Node(inner, Origin("x", Path()))

    for method in OPTIONS:
        for name, fragment in method_fields(method).items():
            if name not in ("debug",):  # TRL's default is "", which a recipe cannot mean
                assert check_field(node(fragment["default"]), method, name, name) == []


def test_ranges_and_typical_values_reach_the_fields() -> None:
    assert method_fields("dpo")["beta"]["exclusiveMinimum"] == 0
    assert method_fields("sft")["max_length"]["anyOf"][0] == {"type": "integer", "minimum": 2}
    assert method_fields("dpo")["loss_weights"]["anyOf"][0]["items"] == {"type": "number", "minimum": 0}
