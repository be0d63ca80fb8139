"""`doctor resume`: equal runs are called equal, and a planted difference is named with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.preflight.resume import _is_small, find_differences, list_stages
from alignkit.recipe import load_recipe


def write_run(path: Path, losses: list[float], weights: bytes) -> Path:
    (path / "model").mkdir(parents=True)
    rows = [{"step": step, "loss": loss, "train_runtime": 100 * loss} for step, loss in enumerate(losses, 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "model" / "model.safetensors").write_bytes(weights)
    return path


def test_the_first_metric_that_differs_and_the_weights_are_named(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "a", [1.0, 0.5, 0.25], b"weights")
    assert list(find_differences(whole, write_run(tmp_path / "b", [1.0, 0.5, 0.25], b"weights"))) == []
    assert list(find_differences(whole, write_run(tmp_path / "c", [1.0, 0.5, 0.26], b"Weights"))) == [
        "loss at step 3 is 0.25 without and 0.26 with the kill", "model/model.safetensors has other weights",
    ]  # fmt: skip
    assert list(find_differences(whole, write_run(tmp_path / "d", [1.0, 0.5], b"weights"))) == [
        "step at step 3 is 3 without and None with the kill"
    ]


RECIPE = """
name: a
model: {path: org/large, quantization: nf4}
lora: {r: 4}
sft: {data: builtin:instructions, objective: distill, max_length: 4096, teacher: {model: org/larger, top_k: 8}}
label: {data: builtin:prompts, constitution: builtin:harmlessness, judge: {model: org/larger}}
rm: {start_from: sft, data: builtin:preferences}
dpo: {start_from: sft, data: builtin:preferences, eval: 0.1, num_train_epochs: 2}
ppo:
  start_from: sft
  data: builtin:prompts
  reward: rm
  preset: grpo
  batch_size: 30
  num_generations: 3
  total_episodes: 100000
  max_new_tokens: 512
  push_to: org/policy
verified: {method: ppo, data: builtin:prompts, reward: {verify: regex}}
"""


def test_a_stage_that_cannot_be_tried_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(RECIPE)
    assert list_stages(load_recipe(path), None) == ["sft", "rm", "dpo", "ppo", "verified"]
    with pytest.raises(RecipeError, match="stages that train can be tried: sft, rm, dpo, ppo, verified"):
        list_stages(load_recipe(path), "label")


SCORED = """
name: a
model: {path: builtin:tiny-llama}
ppo:
  data: builtin:prompts
  reward: [{function: "scoring:short", weight: 0.5}, org/large]
  preset: grpo
  batch_size: 32
  total_episodes: 100000
  max_new_tokens: 512
dpo: {data: builtin:preferences}
checked: {method: ppo, data: builtin:prompts, reward: {verify: code}}
"""


def test_rewards_that_are_code_are_refused_as_everywhere_before_anything_is_tried(run_alignkit, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SCORED)
    said = (
        "a.yaml:6: the reward function scoring:short is code, which a recipe cannot allow; read it, and give "
        "--trust-code on the command line"
    )
    done = run_alignkit("doctor", "resume", "--recipe", "a.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "a.yaml:12: verify: code runs what a model writes" in done.stderr
    assert said in run_alignkit("ppo", "--recipe", "a.yaml", "--stage", "ppo").stderr
    (tmp_path / "scoring.py").write_text("def shorter(prompts, completions):\n    return [0.0] * len(prompts)\n")
    done = run_alignkit("doctor", "resume", "--recipe", "a.yaml", "--stage", "ppo", "--trust-code")
    assert done.returncode == 2 and "a.yaml:6: the reward function scoring:short: short is not there" in done.stderr


@pytest.mark.slow
def test_a_reward_function_that_is_trusted_scores_the_try_beside_what_stands_in(run_alignkit, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SCORED)
    (tmp_path / "scoring.py").write_text(
        "from pathlib import Path\n\n\ndef short(prompts, completions):\n"
        "    Path('called').open('a').write(f'{len(prompts)}\\n')\n"
        "    return [-len(text) / 100 for text in completions]\n"
    )
    done = run_alignkit("doctor", "resume", "--recipe", "a.yaml", "--stage", "ppo", "--trust-code", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["stages"]
    assert (found["differences"], found["instead"]) == ([], ["reward"])
    assert len((tmp_path / "called").read_text().split()) >= 2 * found["steps"]  # of both runs


def test_models_of_a_hub_and_of_stages_that_have_not_run_are_not_small(tmp_path: Path) -> None:
    assert [_is_small(model) for model in ("org/large", str(tmp_path / "rm" / "model"), None)] == [False] * 3
    assert _is_small("builtin:tiny-llama")


@pytest.mark.slow
def test_every_stage_is_killed_and_resumed_and_found_equal(run_alignkit, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(RECIPE)
    done = run_alignkit("doctor", "resume", "--recipe", "a.yaml", "--json")
    assert done.returncode == 0, done.stderr
    *found, failed = json.loads(done.stdout)["stages"]
    assert failed["stage"] == "verified" and "verify: regex needs the column pattern in every row" in failed["reason"]
    assert [(each["stage"], each["differences"], each["instead"]) for each in found] == [
        ("sft", [], ["teacher"]), ("rm", [], []), ("dpo", [], []), ("ppo", [], ["reward"]),
    ]  # fmt: skip
    assert all(each["steps"] // 2 <= each["killed_at"] < each["steps"] for each in found)
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]
