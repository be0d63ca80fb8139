"""A recipe is judged without loading anything that trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "numpy", "pyarrow", "rich")

SCRIPT = """
import json, sys
from pathlib import Path
from alignkit.errors import RecipeError
from alignkit.recipe import load_recipe, recipe_schema, resolve
resolve(load_recipe(Path("good.yaml")), "sft").to_dict()
assert "alignkit.recipe.sweep" not in sys.modules, "the recipe has none"
recipe_schema()
try:
    load_recipe(Path("bad.yaml"))
except RecipeError as error:
    print(json.dumps([str(error), sorted(sys.modules)]))
"""


def test_neither_a_good_nor_a_bad_recipe_loads_a_training_library(run_python: Callable, directory: Path) -> None:
    (directory / "good.yaml").write_text("model: {path: gpt2}\nsft: {data: x/y}\n")
    (directory / "bad.yaml").write_text("model: {path: gpt2}\nsft: {dta: x/y}\n")
    done = run_python("-c", SCRIPT)
    assert done.stderr == ""
    message, modules = json.loads(done.stdout)
    assert "bad.yaml:2: sft.dta is not a key of sft; did you mean data?" in message
    assert [name for name in modules if name.split(".")[0] in HEAVY] == []
