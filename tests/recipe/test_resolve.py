"""A resolved stage has every value in force, with where it came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.recipe import Recipe, resolve

Load = Callable[..., Recipe]

RECIPE = """\
model: {path: builtin:tiny-gpt2, init: scratch}
lora: {r: 4}
data: x/y
pretrain: {method: sft, objective: lm}
sft: {start_from: pretrain, learning_rate: 5e-4}
rm: {start_from: sft, eval: 0.1}
dpo: {start_from: sft, loss_type: ipo}
stages: [pretrain, rm, sft]
"""


def test_stages_come_in_the_order_of_the_list(load: Load) -> None:
    assert load(RECIPE).stage_names == ["pretrain", "rm", "sft", "dpo"]


def test_values_and_where_they_came_from(load: Load) -> None:
    stage = resolve(load(RECIPE, "dpo.beta=0.2"), "dpo")
    assert (stage.name, stage.method, stage.recipe_name, stage.recipe_path) == ("dpo", "dpo", "a", "a.yaml")
    assert dict(stage.trainer) == {
        "learning_rate": 5e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "max_grad_norm": 1.0,
        "max_length": 1024,
        "num_train_epochs": 1.0,
        "logging_steps": 10,
        "save_steps": 100,
        "gradient_checkpointing": False,
        "loss_type": ["ipo"],
        "beta": 0.2,
    }
    keys = (
        "model.path",
        "model.dtype",
        "lora.r",
        "lora.alpha",
        "dpo.data.0.path",
        "dpo.beta",
        "dpo.max_length",
        "seed",
    )
    assert [stage.origins.get(key) for key in keys] == [
        "a.yaml:1", "default", "a.yaml:2", "default", None, "--set", "default", "default",
    ]  # fmt: skip
    assert (stage.where("dpo.loss_type"), stage.where("dpo.max_length")) == ("a.yaml:7", "a.yaml")
    assert not [key for key in stage.origins if key.startswith(("sft.", "rm."))]
    assert json.loads(json.dumps(stage.to_dict()))["trainer"]["beta"] == 0.2


def test_alpha_is_twice_the_rank_where_it_is_not_given(load: Load) -> None:
    for given, alpha in (("lora: {r: 4}", 8), ("lora: {}", 32), ("lora: {r: 4, alpha: 5}", 5)):
        stage = resolve(load(f"model: {{path: builtin:tiny-gpt2}}\n{given}\nsft: {{data: builtin:reviews}}"), "sft")
        assert stage.lora is not None and stage.lora.alpha == alpha


def test_every_value_in_force_has_an_origin(load: Load) -> None:
    for name in load(RECIPE).stage_names:
        stage = resolve(load(RECIPE), name)
        values = [f"{name}.{key}" for key in (*stage.options.model_dump(), *stage.trainer)]
        values += [f"model.{key}" for key in stage.model.model_dump()] + ["seed", "launch.device"]
        assert [key for key in values if key not in stage.origins] == []


def test_a_stage_from_random_weights_trains_all_of_them(load: Load) -> None:
    recipe = load(RECIPE, "model.quantization=nf4")
    pretrain, sft = resolve(recipe, "pretrain"), resolve(recipe, "sft")
    assert (pretrain.lora, pretrain.model.quantization, pretrain.trainer["learning_rate"]) == (None, "none", 2.5e-4)
    assert sft.lora is not None and sft.lora.r == 4
    assert sft.model.quantization == "nf4"


@pytest.mark.parametrize(
    ("method", "lora", "full"), [("sft", 2e-4, 2e-5), ("rm", 1e-4, 1e-5), ("dpo", 5e-6, 5e-7)]
)  # fmt: skip
def test_learning_rates_depend_on_method_and_adapter(load: Load, method: str, lora: float, full: float) -> None:
    text = f"model: {{path: gpt2}}\n{method}: {{data: x/y}}\n"
    assert resolve(load(text), method).trainer["learning_rate"] == full
    assert resolve(load(text, "lora={}"), method).trainer["learning_rate"] == lora
    assert "gradient_checkpointing" not in resolve(load(text), method).trainer


def test_evaluation_is_on_when_there_is_something_to_evaluate(load: Load) -> None:
    recipe = load(RECIPE)
    assert "eval_strategy" not in resolve(recipe, "sft").trainer
    assert {key: resolve(recipe, "rm").trainer[key] for key in ("eval_strategy", "eval_steps")} == {
        "eval_strategy": "steps",
        "eval_steps": 0.1,
    }
    assert "eval_steps" not in resolve(load(RECIPE, "rm.eval_strategy=epoch"), "rm").trainer


def test_directories_of_runs(load: Load) -> None:
    recipe = load(RECIPE, "name=tiny")
    dpo = resolve(recipe, "dpo")
    assert (dpo.run_dir, dpo.start_dir, dpo.start_stage) == ("runs/tiny/dpo", "runs/tiny/sft/model", "sft")
    assert resolve(recipe, "dpo", out=Path("o/x")).run_dir == "o/x"
    assert (resolve(recipe, "pretrain").start_dir, resolve(recipe, "pretrain").start_stage) == (None, None)


def test_start_from_a_run_is_its_model(load: Load, directory: Path) -> None:
    run = directory / "runs" / "other" / "sft"
    run.mkdir(parents=True)
    (run / "stage.json").write_text("{}")
    text = "model: {path: gpt2}\ndpo: {data: x/y, start_from: runs/other/sft}\n"
    assert resolve(load(text), "dpo").start_dir == f"{run}/model"
    assert resolve(load(text, "dpo.start_from=org/model"), "dpo").start_dir == "org/model"
    assert resolve(load(text, "model.path=runs/other/sft"), "dpo").model.path == f"{run}/model"


def test_a_method_picks_its_only_stage(load: Load) -> None:
    recipe = load(RECIPE)
    assert resolve(recipe, method="dpo", trust_code=True).trust_code is True
    assert resolve(recipe, method="rm").name == "rm"
    for arguments, message in [
        ({"method": "sft"}, "a.yaml: the recipe has several sft stages: pretrain, sft; name one with --stage"),
        ({"stage": "dppo"}, "a.yaml: --stage dppo: the recipe has no such stage; did you mean dpo?"),
        ({"stage": "zzzzz"}, "a.yaml: --stage zzzzz: the recipe has no such stage; there are pretrain, rm, sft, dpo"),
        ({"stage": "rm", "method": "dpo"}, "a.yaml: --stage rm is a stage of rm; run `alignkit rm`"),
        ({}, "a.yaml: the recipe has several stages: pretrain, rm, sft, dpo; name one with --stage"),
    ]:
        with pytest.raises(RecipeError) as caught:
            resolve(recipe, **arguments)
        assert str(caught.value) == message
    with pytest.raises(RecipeError, match="the recipe has no rm stage; its stages are sft"):
        resolve(load("model: {path: gpt2}\nsft: {data: x/y}\n"), method="rm")


def test_fingerprints_tell_what_trains_from_what_watches(load: Load) -> None:
    def values(*overrides: str) -> dict[str, object]:
        return resolve(load(RECIPE, *overrides), "dpo").fingerprint_values()

    assert values() == values("dpo.logging_steps=1", "dpo.keep_checkpoints=5", "dpo.save_steps=7")
    assert values() != values("dpo.beta=0.3")
    assert values() != values("seed=1")
    assert values() != values("lora.r=8")
    assert values() != values("dpo.loss_type=hinge")


def test_a_label_stage_is_scored_by_a_stage_of_the_recipe(load: Load) -> None:
    recipe = load("model: {path: gpt2}\ndata: x/y\nrm: {}\nlabel: {reward: [rm, {model: o/r, weight: 2}]}\n")
    stage = resolve(recipe, "label")
    assert [part["model"] for part in stage.to_dict()["options"]["reward"]] == ["runs/a/rm/model", "o/r"]
    assert stage.reward_stages == {"runs/a/rm/model": "rm"}
