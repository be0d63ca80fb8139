"""Every recipe in the repository loads, resolves, and explains each of its keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alignkit.recipe import load_recipe, resolve
from alignkit.recipe.schema import PpoOptions

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


def test_the_recipes_are_there() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {"tiny-cpu", "llama-qlora", "qwen-lora", "full-finetune", "hh-real", "smoke", "ppo-llama-qlora"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_stage_resolves(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for name in recipe.stage_names:
        stage = resolve(recipe, name)
        assert stage.run_dir == f"runs/{path.stem}/{name}"
        assert stage.options.data


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_has_a_comment(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    bare = [line for line in lines if re.match(r"\s*[\w-]+:\s*\S", line.split("#")[0]) and "  # " not in line]
    assert [line for line in bare if " # " not in line] == []


def options_of_ppo(name: str) -> PpoOptions:
    stage = resolve(load_recipe(next(path for path in RECIPES if path.stem == name)), method="ppo")
    assert isinstance(stage.options, PpoOptions)
    return stage.options


def test_the_demos_need_no_code_and_start_the_critic_from_the_reward_model() -> None:
    for name in ("tiny-cpu", "smoke", "ppo-llama-qlora"):
        options = options_of_ppo(name)
        assert [(source.model, source.function) for source in options.reward] == [(f"runs/{name}/rm/model", None)]
        assert all(source.function is None for source in options.gold or ())
        assert options.critic_start == "reward"


def test_the_large_ppo_recipe_controls_its_kl() -> None:
    options = options_of_ppo("ppo-llama-qlora")
    assert (options.kl_target, options.kl_horizon, options.max_kl) == (6.0, 10_000, 40)
    assert options.batch_size * options.minibatches == 512
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "ppo-llama-qlora"))
    assert recipe.lora is not None and recipe.model.quantization == "nf4"  # one 4-bit base holds the four roles


def test_hh_real_takes_its_path_from_the_command_line(tmp_path: Path) -> None:
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "hh-real"), overrides=[f"data.path={tmp_path}"])
    assert {source.path for section in recipe.stages.values() for source in section.options.data} == {str(tmp_path)}
