"""`alignkit eval`, `diff` and the recipe's `evaluate:` from the command line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.recipe import load_recipe

Run = Callable[..., subprocess.CompletedProcess[str]]
RECIPE = """name: tiny
model: {path: builtin:tiny-gpt2, init: scratch, chat_template: chatml}
sft: {data: {path: builtin:instructions, max_rows: 40}, eval: 0.2, max_steps: 2, batch_size: 4, max_length: 128}
rm: {start_from: sft, data: {path: builtin:preferences, max_rows: 40}, eval: 0.2, max_steps: 2, batch_size: 4}
dpo: {start_from: sft, data: {path: builtin:preferences, max_rows: 40}, eval: 0.2, max_steps: 2, batch_size: 4}
evaluate: {max_rows: 4, max_new_tokens: 8, resamples: 100, reward: rm, against: sft, best_of: [2]}
"""


def test_the_recipe_s_evaluate_section_is_checked_with_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    (tmp_path / "held.jsonl").write_text('{"text": "a"}\n')
    file.write_text(RECIPE.replace("max_rows: 4,", "data: held.jsonl, max_rows: 4,"))
    loaded = load_recipe(file)
    assert (loaded.evaluate.max_rows, loaded.evaluate.against, loaded.evaluate.best_of) == (4, "sft", [2])
    assert loaded.evaluate.data is not None and loaded.evaluate.data[0].path == str(tmp_path / "held.jsonl")
    file.write_text(RECIPE.replace("best_of: [2]", "best_of: [0], shotz: 3"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert len(caught.value.problems) == 2 and "recipe.yaml:6" in str(caught.value)
    assert "did you mean shots?" in str(caught.value)


def test_mistakes_of_the_command_line_are_one_line(run_alignkit: Run) -> None:
    for arguments, message in (
        ((), "give a RUN or --recipe FILE"),
        (("nowhere/at/all",), "nowhere/at/all does not exist"),
        (("x", "--split", "test"), "--split belongs to --data"),
        (("x", "--metric", "kll"), "--metric: is kll; it must be one of"),
    ):
        done = run_alignkit("eval", *arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_recipe_is_trained_measured_and_compared(run_alignkit: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    done = run_alignkit("run", "--recipe", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    done = run_alignkit("eval", "--recipe", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    for stage in ("sft", "rm", "dpo"):
        assert f"tiny/{stage}\n" in done.stdout
    results = json.loads((tmp_path / "runs/tiny/dpo/eval.json").read_text())["results"]
    whole = {result["metric"] for result in results}
    assert {"perplexity", "implicit_reward_accuracy", "kl", "win_rate", "best_of_n", "true_reward"} <= whole
    again = run_alignkit("eval", "runs/tiny/dpo", "--max-rows", "4", "--max-new-tokens", "8", "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["name"] == "tiny/dpo"
    difference = run_alignkit("diff", "runs/tiny/sft", "runs/tiny/dpo", "--json")
    assert json.loads(difference.stdout)["settings"]["method"] == ["sft", "dpo"]
