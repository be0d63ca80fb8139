"""ZeRO on two processes of this machine's CPU: the curve of one process, and checkpoints that one process can read."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranked_runs import (
    FUNCTIONS,
    KINDS,
    PPO_STEPS,
    critic_difference,
    largest_difference,
    weight_difference,
    write_recipe,
)  # fmt: skip
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
STEPS = 6
COMMON = (
    f"eval: 0.2, batch_size: 8, micro_batch_size: 4, max_steps: {STEPS}, learning_rate: 1e-3, logging_steps: 1, "
    "save_steps: 3, samples: {num: 2, max_new_tokens: 6}"
)
RECIPE = f"""
name: zero
model: {{path: builtin:tiny-llama}}
sft: {{data: {{path: builtin:instructions, max_rows: 42}}, {COMMON}}}
dpo: {{data: {{path: builtin:preferences, max_rows: 42}}, {COMMON}}}
"""


def train(
    recipe: Path, name: str, method: str, strategy: str, *settings: str, start: str | None = None, steps: int = STEPS
) -> Path:
    """Train a stage with one process or with two, from the middle of another run if asked; return its directory."""
    out = recipe.parent / name
    if start is not None:
        shutil.copytree(recipe.parent / start, out)
        (out / "result.json").unlink()
        shutil.rmtree(out / "model")
        shutil.rmtree(out / "checkpoints" / f"checkpoint-{steps}")
    words = [sys.executable, "-m", "alignkit", method, "-r", str(recipe), "--out", str(out), "--trust-code"]
    settings = ("launch.device=cpu", *settings)
    if strategy != "one":
        settings += (f"launch.strategy={strategy}", "launch.processes=2")
    words += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        words,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if strategy != "one":
        assert f"2 processes ({strategy}, cpu)" in done.stderr
    return out


def assert_same(first: Path, second: Path) -> None:
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (first, second)]
    losses = [[row["loss"] for row in found if "loss" in row] for found in rows]
    assert len(losses[0]) == STEPS and len(set(losses[0])) > 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    (one,), (other,) = ([*(run / "model").glob("*model.safetensors")] for run in (first, second))
    weights, others = load_file(one), load_file(other)
    assert weights.keys() == others.keys()
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-3
    print(second.name, "loss", max(abs(a - b) for a, b in zip(*losses, strict=True)))


@pytest.mark.parametrize(("method", "mode"), [("sft", "full"), ("dpo", "lora"), ("dpo", "full")])
def test_zero_has_the_curve_of_one_process_and_both_go_on_from_each_other(
    method: str, mode: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + ("lora: {r: 4, alpha: 8}\n" if mode == "lora" else ""))
    one = train(recipe, "one", method, "one")
    for strategy in ("zero2", "zero3"):
        assert_same(one, train(recipe, strategy, method, strategy))
        assert_same(one, train(recipe, f"one-to-{strategy}", method, strategy, start="one"))
        assert_same(one, train(recipe, f"{strategy}-to-one", method, "one", start=strategy))


@pytest.mark.parametrize("name", KINDS)
def test_ppo_has_the_curve_the_critic_and_the_weights_of_one_process(name: str, tmp_path: Path) -> None:
    (tmp_path / "counting.py").write_text(FUNCTIONS)
    recipe, settings = write_recipe(tmp_path, name, *KINDS[name]), list[str]()
    if "reward: {" not in KINDS[name][1]:
        settings = [f"ppo.reward={train(recipe, 'rm', 'rm', 'one')}"]
    one = train(recipe, "one", "ppo", "one", *settings)
    strategies = ["zero2"] if "ema" in KINDS[name][1] else ["zero2", "zero3"]
    for strategy in strategies:
        if (name, strategy) == ("lora", "zero3"):  # no critic of its own adapter there, so the curve is another
            settings += ["ppo.value_init=policy"]
            one = train(recipe, "one-head", "ppo", "one", *settings)
        assert_same_ppo(one, whole := train(recipe, strategy, "ppo", strategy, *settings))
        back = train(recipe, f"{strategy}-to-one", "ppo", "one", *settings, start=strategy, steps=PPO_STEPS)
        assert_same_ppo(one, back)
        again = train(recipe, f"{strategy}-again", "ppo", strategy, *settings, start=strategy, steps=PPO_STEPS)
        assert_same_ppo(whole, again, bound=0.0)


def assert_same_ppo(first: Path, second: Path, *, bound: float = 1e-4) -> None:
    found = largest_difference(first, second)
    assert max(found.values()) <= 10 * bound and found["response_length"] == found["num_tokens"] == 0, found
    weights, critic = weight_difference(first, second), critic_difference(first, second)
    print(first.name, second.name, f"worst {max(found.values()):.1e} weights {weights:.1e} critic {critic:.1e}")
    assert max(weights, critic) <= bound
