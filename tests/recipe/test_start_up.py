"""A recipe is judged without loading anything that trains, and training loads nothing that it does not use."""

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


TRAINS = """
import sys
from alignkit.cli import main
sys.argv = ["alignkit", "sft", "--recipe", "sft.yaml"]
try:
    assert main() == 0
finally:
    print("bitsandbytes" in sys.modules)
import bitsandbytes, peft.helpers
assert peft.import_utils.is_bnb_4bit_available()
"""


def test_training_that_quantises_nothing_does_not_load_bitsandbytes(run_python: Callable, directory: Path) -> None:
    data = "{path: builtin:instructions, max_rows: 8}"
    (directory / "sft.yaml").write_text(f"model: {{path: builtin:tiny-gpt2}}\nsft: {{data: {data}, max_steps: 1}}\n")
    done = run_python("-c", TRAINS)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["False"]), done.stderr
