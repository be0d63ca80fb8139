"""What `alignkit doctor` says of versions, this machine and what works here, and of a run killed and resumed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.preflight.doctor import (
    SAFE_SINCE,
    Ability,
    DoctorReport,
    Library,
    _is_small,
    describe_system,
    describe_variables,
    find_differences,
    judge_version,
    list_stages,
    read_libraries,
    require_versions,
    try_abilities,
    try_ability,
)
from alignkit.recipe import load_recipe
from alignkit.runs.record import count_cores, memory_bytes

HEALTHY = DoctorReport(
    system={"cores": "2"},
    variables={},
    libraries=[Library("trl", "1.16.0", ">=1.16", None, None), Library("wandb", None, "", "trackers", "not there")],
    devices={"cpu": "2 threads"},
    abilities=[Ability("quantization: nf4", False, "ImportError: no bitsandbytes")],
    torch_problem=None,
)


def test_what_ends_with_exit_code_8_and_what_is_left_out_of_the_tables() -> None:
    assert HEALTHY.problems() == [] and HEALTHY.error() is None  # a missing extra or ability is no error
    assert [title for title, _, _ in HEALTHY.tables()] == ["This computer", "Libraries", "What works here"]
    error = replace(HEALTHY, libraries=[Library("trl", "1.17.0", "<1.17", None, "trl is 1.17.0")]).error()
    assert error is not None and (str(error), error.exit_code) == ("trl is 1.17.0", 8)
    assert replace(HEALTHY, torch_problem="torch does not load: libcuda").problems() == ["torch does not load: libcuda"]


@pytest.mark.slow
def test_command_prints_one_json_document(run_alignkit) -> None:
    done = run_alignkit("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["devices"]["cpu"] == "1 thread"


def test_libraries_are_installed_and_accepted_and_have_a_safety_floor() -> None:
    libraries = {library.name: library for library in read_libraries()}
    assert {"torch", "trl", "transformers", "peft", "bitsandbytes", "datasets", "typer"} <= set(libraries)
    assert [library.problem for library in libraries.values() if library.extra is None and library.problem] == []
    require_versions()
    extras = {library.name for library in libraries.values() if library.extra is not None}
    assert extras == {"tensorboard", "trackio", "wandb"}
    assert set(SAFE_SINCE) <= {name.lower() for name in libraries}


@pytest.mark.parametrize(
    ("name", "installed", "accepted", "problem"),
    [
        ("torch", "2.9.1", ">=2.0", "torch 2.9.1 has known security holes; alignkit needs 2.10: pip install "
         "'torch>=2.10'"),
        ("torch", "2.13.0+cpu", ">=2.10", None),
        ("trl", "1.17.0", "<1.17,>=1.16", "trl is 1.17.0; alignkit needs <1.17,>=1.16: pip install 'trl<1.17,>=1.16'"),
    ],
)  # fmt: skip
def test_a_version_is_judged_for_safety_first_then_by_its_bounds(
    name: str, installed: str, accepted: str, problem: str | None
) -> None:
    assert judge_version(name, installed, accepted) == problem


def test_variables_disk_memory_and_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    variables = describe_variables()
    assert (variables["HF_TOKEN"], variables["OMP_NUM_THREADS"]) == ("set", "3")  # never the value of a secret
    assert describe_system(tmp_path / "runs" / "a")["disk"].endswith(f"at {tmp_path}")
    assert 0 < count_cores() <= (os.cpu_count() or 1)
    assert 0 < memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_failed_try_becomes_a_reason_not_an_exception() -> None:
    def fail() -> None:
        raise RuntimeError("no kernel image\nwith a long story")

    ability = try_ability("something", "on cpu", fail)
    assert (ability.works, ability.note) == (False, "RuntimeError: no kernel image")


@pytest.mark.slow
def test_quantisation_is_really_tried_on_this_machine() -> None:
    abilities = {ability.name: ability for ability in try_abilities()}
    assert abilities["full fine-tuning and LoRA"].works
    for kind in ("nf4", "fp4", "int8"):
        assert abilities[f"quantization: {kind}"].works, abilities[f"quantization: {kind}"].note
    assert {"kernels of Triton (TRL's fused head)", "use_kernels, attn_implementation of the hub"} <= abilities.keys()


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
