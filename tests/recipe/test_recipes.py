"""Every recipe in the repository loads, resolves, and explains each of its keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alignkit.recipe import load_recipe, resolve

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


def test_the_recipes_are_there() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {"tiny-cpu", "llama-qlora", "qwen-lora", "full-finetune", "hh-real"}


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


def test_hh_real_takes_its_path_from_the_command_line(tmp_path: Path) -> None:
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "hh-real"), overrides=[f"data.path={tmp_path}"])
    assert {source.path for section in recipe.stages.values() for source in section.options.data} == {str(tmp_path)}
