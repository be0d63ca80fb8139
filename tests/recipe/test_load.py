"""Files, fragments and --set values become one recipe whose values know where they came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.recipe import Recipe, load_recipe

Load = Callable[..., Recipe]
Complain = Callable[..., list[str]]

BASE = """\
model:
  path: gpt2
  dtype: float32
lora: {r: 8}
sft:
  data: [{path: x/y, weight: 2}, x/z]
  learning_rate: 1e-4
"""


def write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")


def test_fragments_merge_and_every_value_keeps_its_place(load: Load) -> None:
    write("parts/base.yaml", BASE)
    write("parts/fast.yaml", "sft:\n  learning_rate: 5e-4\n  max_steps: 5\n")
    recipe = load(
        "extends: [parts/base.yaml, parts/fast.yaml]\nmodel:\n  dtype: bfloat16\nsft:\n  data: x/w\n", "sft.max_steps=7"
    )
    sft = recipe.stages["sft"]
    assert (recipe.model.path, recipe.model.dtype) == ("gpt2", "bfloat16")
    assert [source.path for source in sft.options.data] == ["x/w"]
    assert sft.trainer == {"learning_rate": 5e-4, "max_steps": 7}
    assert {
        key: recipe.origins[key] for key in ("model.path", "model.dtype", "lora.r", "sft.data", "sft.max_steps")
    } == {
        "model.path": "parts/base.yaml:2",
        "model.dtype": "a.yaml:3",
        "lora.r": "parts/base.yaml:4",
        "sft.data": "a.yaml:5",
        "sft.max_steps": "--set",
    }


def test_a_mistake_in_a_fragment_names_the_fragment(complain: Complain) -> None:
    write("parts/base.yaml", BASE.replace("learning_rate", "learning_rat"))
    assert complain("extends: parts/base.yaml\nseed: -1\n") == [
        "a.yaml:2: seed is -1; it must be at least 0 and less than 4294967296",
        "parts/base.yaml:7: sft.learning_rat is not a key of sft; did you mean learning_rate?",
    ]


def test_null_takes_a_section_of_a_fragment_away(load: Load) -> None:
    write("base.yaml", BASE)
    assert load("extends: base.yaml\nlora: null\n").lora is None
    assert load("extends: base.yaml\n", "lora=null").lora is None
    assert load("extends: base.yaml\n").lora is not None


def test_extends_cycles_and_missing_fragments_are_refused(complain: Complain) -> None:
    write("b.yaml", "extends: a.yaml\n")
    assert complain("seed: 1\nextends: b.yaml\n") == [
        "b.yaml:1: extends goes round in a circle: a.yaml -> b.yaml -> a.yaml"
    ]
    write("bases.yaml", BASE)
    assert complain("\nextends: [base.yaml]\n") == [
        "a.yaml:2: extends names base.yaml, does not exist; did you mean bases.yaml?"
    ]
    assert complain("extends: {a: 1}\n") == ["a.yaml:1: extends must be a file name or a list of file names"]
    assert complain("extends: [1]\n") == ["a.yaml:1: extends must be a file name or a list of file names"]


def test_a_fan_of_fragments_is_bounded(complain: Complain) -> None:
    for i in range(12):
        write(f"f{i}.yaml", f"extends: [f{i + 1}.yaml, f{i + 1}.yaml]\n")
    write("f12.yaml", BASE)
    assert "extends reads more than 32 files" in complain("extends: f0.yaml\n")[0]


def test_a_missing_recipe_names_the_nearest_file() -> None:
    write("recipes/tiny.yaml", BASE)
    write("recipes/large.yaml", BASE)
    for path, message in [
        ("recipes/tinny.yaml", "recipe recipes/tinny.yaml does not exist; did you mean recipes/tiny.yaml?"),
        ("recipes/zzzzzz.yaml", "recipe recipes/zzzzzz.yaml does not exist; recipes has large.yaml, tiny.yaml"),
        ("recipe/tiny.yaml", "recipe recipe/tiny.yaml does not exist; there is no directory recipe"),
        ("recipes", "recipe recipes is a directory; name a file in it, such as large.yaml"),
    ]:
        with pytest.raises(RecipeError) as caught:
            load_recipe(Path(path))
        assert str(caught.value) == message


def test_places_outside_the_working_directory_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("r/a.yaml", "seed: x\n" + BASE)
    write("elsewhere/x", "")
    monkeypatch.chdir("elsewhere")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r" / "a.yaml")
    assert str(caught.value).startswith(f"{tmp_path}/r/a.yaml:1: seed is x;")


def test_overrides_reach_into_sections_and_lists(load: Load) -> None:
    recipe = load(BASE, "sft.data.0.weight=0.5", "sft.learning_rate=5e-6", "seed=3")
    assert recipe.stages["sft"].options.data[0].weight == 0.5
    assert recipe.stages["sft"].trainer["learning_rate"] == 5e-6
    assert recipe.seed == 3


def test_overrides_can_add_a_stage(load: Load) -> None:
    recipe = load(BASE, "dpo={data: x/y, start_from: sft}", "dpo.beta=0.2")
    assert recipe.stage_names == ["sft", "dpo"]
    assert recipe.origins["dpo.start_from"] == "--set"


def test_wrong_overrides_are_reported_with_the_rest(complain: Complain) -> None:
    wrong = ("foo", "=1", "sft..x=1", "sft.data.7.weight=1", "sft.lr=[1", "sft.max_step=5")
    assert complain(BASE + "sed: 1\n", *wrong) == [
        "a.yaml:8: sed is not a key of a recipe; did you mean seed?",
        "--set: foo is not KEY.PATH=VALUE, such as dpo.beta=0.2",
        "--set: =1 is not KEY.PATH=VALUE, such as dpo.beta=0.2",
        "--set: sft..x=1 is not KEY.PATH=VALUE, such as dpo.beta=0.2",
        "--set: sft.data.7.weight: 7 is not a position in a list of 2",
        "--set: sft.lr=[1: a bracket or quote that opens here is never closed",
        "--set: sft.max_step is not a key of sft; did you mean max_steps?",
    ]


def test_an_override_below_a_value_is_refused(complain: Complain) -> None:
    assert complain("seed: 1\n" + BASE, "seed.x=1") == [
        "--set: seed.x: what stands before .x is a single value, not a section"
    ]
