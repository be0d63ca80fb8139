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
from alignkit.recipe.schema import (
    OPTIONS,
    DataSource,
    EvaluateOptions,
    LaunchOptions,
    LoraOptions,
    ModelOptions,
    RecipeOptions,
)
from alignkit.recipe.trl_fields import (
    CONTROLLED,
    CONTROLLED_IN,
    MOVED,
    MOVED_IN,
    OWN,
    PPO_CONTROLLED,
    PPO_MOVED,
    method_fields,
    read_snapshot,
    trl_fields,
)

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def snapshot() -> Any:
    spec = importlib.util.spec_from_file_location("snapshot", REPOSITORY / "tests" / "snapshot.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_snapshot_is_what_the_installed_trl_says(snapshot: Any) -> None:
    """Word for word with the versions it was taken from; names, types, defaults and choices with every accepted one."""
    kept = read_snapshot()
    taken = json.loads(snapshot.render(snapshot.take_snapshot()))
    if taken["versions"] != kept["versions"]:
        kept, taken = _without_help(kept), _without_help(taken)
    assert kept == taken, "run `make snapshot` and look at the difference"


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


def test_controlled_fields_exist_and_moved_ones_do_not() -> None:
    fields = {name for config in ("sft", "rm", "dpo", "kto") for name in trl_fields(config)}
    assert set(CONTROLLED) - fields == set()
    assert set(MOVED) & fields == set()
    ppo = set(trl_fields("ppo"))
    assert {*PPO_CONTROLLED, *OWN} - ppo == set()
    assert set(PPO_MOVED) & (ppo | set(OPTIONS["ppo"].model_fields)) == set()


def test_every_field_of_grpo_is_a_key_or_says_what_to_write_instead() -> None:
    """What GRPO has beyond the fields of all trainers is decided about, name by name."""
    decided = {*CONTROLLED_IN["ppo"], *OWN, *method_fields("sft")}
    left = set(trl_fields("ppo")) - decided
    assert left == {"cache_implementation"}


def test_advice_names_keys_that_exist() -> None:
    """Whatever `it is X` says of a key from elsewhere, X is a key here."""
    known = {name for method in OPTIONS for name in (*method_fields(method), *OPTIONS[method].model_fields)}
    sections = {
        "model": ModelOptions,
        "lora": LoraOptions,
        "launch": LaunchOptions,
        "data": DataSource,
        "evaluate": EvaluateOptions,
    }
    known |= {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields}
    advices = [advice for advice in (MOVED | MOVED_IN["ppo"]).values() if advice.startswith("it is ")]
    named = {re.split("[:, ]", advice.removeprefix("it is "))[0] for advice in advices}
    assert named - known == set()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lora_rank: 8", "it is lora.r"),
        ("sample_packing: true", "it is packing"),
        ("template: llama3", "it is model.chat_template"),
        ("max_samples: 100", "it is data.max_rows"),
        ("stage: sft", "the section's name says the method"),
        ("rl: dpo", "the section's name says the method"),
        ("compile: true", "it is torch_compile"),
        ("evals_per_epoch: 4", "it is eval_steps"),
        ("liger_rope: true", "kernels are those of the installed libraries"),
        ("tensor_parallel_size: 4", "no layer over several devices"),
        ("flash_attn: fa2", "it is model.attn_implementation"),
    ],
)
def test_words_of_other_tools_are_answered_with_ours(tmp_path: Path, given: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    for place in ("\n{given}", "\nsft: {{data: builtin:instructions, {given}}}"):
        path.write_text("model: {path: builtin:tiny-gpt2}" + place.format(given=given))
        with pytest.raises(RecipeError, match=re.escape(said)):
            load_recipe(path)


def test_defaults_of_trl_pass_their_own_checks() -> None:
    from alignkit.recipe.check import check_field
    from alignkit.recipe.yaml import Node, Origin

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
    assert json.loads(json.dumps(read_snapshot()))["dpo"]["beta"].get("typical") is None  # the snapshot is not changed
