"""Whole commands on a card: every method in every precision, a kill and a resume, what reads a finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.gpu

REPOSITORY = Path(__file__).resolve().parents[2]
LORA = ["--set", "lora.r=8"]
KINDS = {
    "full": [],
    "lora": LORA,
    "nf4": [*LORA, "--set", "model.quantization=nf4"],
    "int8": [*LORA, "--set", "model.quantization=int8"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_runs_and_its_run_is_read(kind: str, tmp_path: Path, run_card: Callable, note: Callable) -> None:
    recipe = str(REPOSITORY / "recipes/smoke.yaml")
    options = ["--set", "launch.device=cuda", "--set", "model.path=builtin:tiny-llama", *KINDS[kind]]
    for method in ("sft", "rm", "ppo", "dpo"):
        done = run_card(method, "-r", recipe, *options)
        assert done.returncode == 0, done.stdout
        run = tmp_path / f"runs/smoke/{method}"
        result = json.loads((run / "result.json").read_text())
        note("smoke", kind=kind, method=method, wall_seconds=result.get("wall_seconds"))
    again = run_card(method, "-r", recipe, *options)
    assert again.returncode == 0, again.stdout
    done = run_card("eval", "runs/smoke/dpo", "--data", "builtin:preferences", "--max-rows", "16", "--device", "cuda")
    note("eval", kind=kind, code=done.returncode, output=done.stdout[-1500:])
    assert done.returncode == 0, done.stdout


def test_doctor_names_the_card(card: str, run_card: Callable, note: Callable[..., None]) -> None:
    done = run_card("doctor")
    note("doctor", output=done.stdout)
    assert card in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("kind", ["lora", "nf4"])
@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_a_killed_run_goes_on_to_the_same_weights(
    method: str, kind: str, tmp_path: Path, run_card: Callable, note: Callable[..., None]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    reward = "reward: builtin:true-reward, max_new_tokens: 16, ppo_epochs: 2, " if method == "ppo" else ""
    data = "builtin:prompts" if method == "ppo" else "builtin:preferences"
    quantization = ", quantization: nf4" if kind == "nf4" else ""
    recipe.write_text(
        f"name: k\nmodel: {{path: builtin:tiny-llama{quantization}}}\nlaunch: {{device: cuda}}\n"
        f"lora: {{r: 4, alpha: 8, dropout: 0.1}}\n{method}:\n  {{data: "
        f"{{path: {data}, max_rows: 64}}, {reward}max_steps: 8, save_steps: 2, batch_size: 8, learning_rate: 1e-3, "
        "samples: {num: 0}}\n"
    )
    run = tmp_path / f"runs/k/{method}"
    kept = []
    for kill_at in (None, None, run / "checkpoints/checkpoint-4"):
        shutil.rmtree(run, ignore_errors=True)
        done = run_card(method, "-r", str(recipe), kill_at=kill_at)
        if kill_at is not None:
            assert done.returncode == -9
            done = run_card(method, "-r", str(recipe))
        assert done.returncode == 0, done.stdout
        kept.append(load_file(run / "model/adapter_model.safetensors"))
    whole, twice, resumed = kept
    largest = {
        name: max(float((whole[key].float() - other[key].float()).abs().max()) for key in whole)
        for name, other in (("twice", twice), ("resumed", resumed))
    }
    note("resume", method=method, kind=kind, differences=largest)
    assert largest["twice"] == largest["resumed"] == 0.0


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "adamw_8bit"])
def test_bitsandbytes_optimizers_resume(optim: str, tmp_path: Path, run_card: Callable, note: Callable) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: o\nmodel: {path: builtin:tiny-llama}\nlaunch: {device: cuda}\nsft: {data: {path: builtin:instructions, "
        f"max_rows: 64}}, max_steps: 8, save_steps: 2, batch_size: 8, optim: {optim}, samples: {{num: 0}}}}\n"
    )
    run, kept = tmp_path / "runs/o/sft", []
    for kill_at in (None, run / "checkpoints/checkpoint-4"):
        shutil.rmtree(run, ignore_errors=True)
        done = run_card("sft", "-r", str(recipe), kill_at=kill_at)
        if kill_at is not None:
            done = run_card("sft", "-r", str(recipe))
        assert done.returncode == 0, done.stdout
        kept.append(load_file(run / "model/model.safetensors"))
    largest = max(float((kept[0][key] - kept[1][key]).abs().max()) for key in kept[0])
    note("optimizer", optim=optim, largest_difference=largest)
    assert largest == 0.0


def test_torch_compile_and_activation_offloading_train(tmp_path: Path, run_card: Callable, note: Callable) -> None:
    for number, option in enumerate(("torch_compile: true", "activation_offloading: true")):
        recipe = tmp_path / f"recipe{number}.yaml"
        recipe.write_text(
            f"name: c{number}\nmodel: {{path: builtin:tiny-llama}}\nlaunch: {{device: cuda}}\n"
            f"sft: {{data: {{path: builtin:instructions, max_rows: 32}}, max_steps: 3, batch_size: 8, {option}, "
            "samples: {num: 0}}\n"
        )
        done = run_card("sft", "-r", str(recipe))
        note("option", option=option, code=done.returncode, output=done.stdout[-1200:])
        assert done.returncode == 0, done.stdout
