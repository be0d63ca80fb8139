"""`alignkit doctor resume`: whether a killed run of a recipe goes on exactly, tried with a tiny model on a few rows."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit.errors import RecipeError, RunError
from alignkit.models.files import find_model_dir
from alignkit.recipe import Recipe, resolve
from alignkit.recipe.schema import FEEDBACK
from alignkit.runs.checkpoints import newest_step
from alignkit.runs.directory import RunDir
from alignkit.runs.files import describe_files, read_lines

_STEPS, _ROWS, _SMALL_BYTES = 20, 200, 200 << 20
_OF_THE_CLOCK = ("runtime", "second", "time")  # in the names of metrics that differ between two equal runs


def prove_resume(recipe: Recipe, name: str | None) -> dict[str, Any]:
    """Train a stage twice, killed and resumed the second time, and compare; `differences` is empty where all is equal.
    The settings are the recipe's, but for a model that is small, few rows and steps."""
    names = [each for each in recipe.stage_names if recipe.stages[each].options.method not in (*FEEDBACK, "ppo")]
    if (stage_name := name or next(iter(names), None)) not in names:
        raise RecipeError(f"sft, rm and dpo stages can be tried: {', '.join(names) or 'the recipe has none'}")
    stage = resolve(recipe, str(stage_name))
    path, directory = stage.model.path, find_model_dir(stage.model.path)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors")) if directory else 0
    is_small = path.startswith("builtin:") or stage.model.init == "scratch" or 0 < size < _SMALL_BYTES
    rows = [source.model_dump(exclude_unset=True) | {"max_rows": _ROWS} for source in stage.options.data]
    own: dict[str, Any] = {
        "data": rows, "max_steps": _STEPS, "save_steps": 1, "logging_steps": 1, "batch_size": 8, "micro_batch_size": 4,
        "samples": {"num": 0}, "report_to": "none", **({"start_from": None} if stage.options.start_from else {}),
    }  # fmt: skip
    changes = {f"{stage.name}.{key}": value for key, value in own.items()} | {"launch": {"device": stage.launch.device}}
    if not is_small:
        path = "builtin:tiny-llama"
        changes |= {"model": {"path": path}, f"{stage.name}.max_length": 256}
    command = [sys.executable, "-m", "alignkit", stage.method, "--recipe", recipe.path, "--stage", stage.name]
    for key, value in changes.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    with tempfile.TemporaryDirectory(prefix="alignkit-resume-") as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        _run([*command, "--out", str(whole)])
        process = subprocess.Popen([*command, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and (newest_step(killed / "checkpoints") or 0) < _STEPS // 2:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        step = newest_step(killed / "checkpoints")
        _run([*command, "--out", str(killed)])
        differences = list(find_differences(whole, killed))
    return {"stage": stage.name, "model": path, "steps": _STEPS, "killed_at": step, "differences": differences}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"the try ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")


def find_differences(first: Path, second: Path) -> Iterator[str]:
    """Yield where two runs differ first: a metric at a step, and each file of the weights."""
    one, other = ({row["step"]: row for row in read_lines(RunDir(path).metrics)} for path in (first, second))
    for step in sorted({*one, *other}):
        a, b = one.get(step, {}), other.get(step, {})
        keys = [key for key in {**a, **b} if not any(word in key for word in _OF_THE_CLOCK)]
        if key := next((key for key in keys if a.get(key) != b.get(key)), None):
            yield f"{key} at step {step} is {a.get(key)} without and {b.get(key)} with the kill"
            break
    sums = [describe_files(path, (path / "model").glob("*.safetensors")) for path in (first, second)]
    for name in sorted({*sums[0], *sums[1]}):
        if sums[0].get(name, {}).get("crc32") != sums[1].get(name, {}).get("crc32"):
            yield f"{name} has other weights"
