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


def train(directory: Path, name: str, method: str, mode: str, strategy: str, *, start: str | None = None) -> Path:
    """Train a stage with one process or with two, from another run's third step if asked; return its directory."""
    recipe, out = directory / f"{mode}.yaml", directory / name
    recipe.write_text(RECIPE + ("lora: {r: 4, alpha: 8}\n" if mode == "lora" else ""))
    if start is not None:
        shutil.copytree(directory / start, out)
        (out / "result.json").unlink()
        shutil.rmtree(out / "model")
        shutil.rmtree(out / "checkpoints" / f"checkpoint-{STEPS}")
    words = [sys.executable, "-m", "alignkit", method, "-r", str(recipe), "--out", str(out)]
    words += ["--set", "launch.device=cpu"]
    if strategy != "one":
        words += ["--set", f"launch.strategy={strategy}", "--set", "launch.processes=2"]
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


@pytest.mark.parametrize(("method", "mode"), [("sft", "full"), ("dpo", "lora")])
def test_zero_has_the_curve_of_one_process_and_both_go_on_from_each_other(
    method: str, mode: str, tmp_path: Path
) -> None:
    one = train(tmp_path, "one", method, mode, "one")
    for strategy in ("zero2", "zero3"):
        assert_same(one, train(tmp_path, strategy, method, mode, strategy))
        assert_same(one, train(tmp_path, f"one-to-{strategy}", method, mode, strategy, start="one"))
        assert_same(one, train(tmp_path, f"{strategy}-to-one", method, mode, "one", start=strategy))
