"""`alignkit doctor resume`: whether a killed run of a recipe goes on exactly, tried with a tiny model on a few rows."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit.errors import ModelError, Problem, RecipeError, RewardError, RunError
from alignkit.models.files import find_model_dir
from alignkit.recipe import Recipe, resolve
from alignkit.recipe.methods import FEEDBACK, PpoOptions
from alignkit.recipe.schema import BUILTIN_REWARD
from alignkit.rewards.kinds import kind_of
from alignkit.runs.directory import RunDir, newest_step
from alignkit.runs.files import describe_files, read_lines

_STEPS, _ROWS, _TOKENS, _SMALL_BYTES = 20, 200, 16, 200 << 20
_TEACHER = """
name: teacher
model: {path: builtin:tiny-gpt2}
sft: {data: {path: builtin:instructions, max_rows: 32}, batch_size: 8, samples: {num: 0}}
"""
_OF_THE_CLOCK = ("runtime", "second", "time")  # in the names of metrics that differ between two equal runs


def list_stages(recipe: Recipe, name: str | None, *, trust_code: bool = False) -> list[str]:
    """The stage to try, or without `name` all that train; raises RewardError for rewards that are code."""
    names = [each for each in recipe.stage_names if recipe.stages[each].options.method not in FEEDBACK]
    if not names or (name is not None and name not in names):
        raise RecipeError(f"stages that train can be tried: {', '.join(names) or 'the recipe has none'}")
    names = names if name is None else [name]
    refused: list[Problem] = []
    for stage in (resolve(recipe, each, trust_code=trust_code) for each in names):
        for key, source in stage.rewards:
            try:
                if source.function or source.verify == "code":
                    kind_of(source).check(source, stage, key)
            except RewardError as error:
                refused += error.problems
    if refused:
        raise RewardError(refused)
    return names


def prove_resume(recipe: Recipe, name: str, *, trust_code: bool = False) -> dict[str, Any]:
    """Train a stage twice, killed and resumed the second time, and compare; `differences` is empty where all is equal.
    The settings are the recipe's, but for models that are small, few rows and steps, and rewards that need no others;
    `instead` has the keys whose own values were not tried."""
    stage = resolve(recipe, name, trust_code=trust_code)
    path, options = stage.model.path, stage.training
    rows = [source.model_dump(exclude_unset=True) | {"max_rows": _ROWS} for source in options.data]
    own: dict[str, Any] = {
        "data": rows, "save_steps": 1, "logging_steps": 1, "batch_size": 8, "micro_batch_size": 4,
        "samples": {"num": 0}, "report_to": "none", **({"start_from": None} if options.start_from else {}),
    }  # fmt: skip
    # A try is measured and pushed nowhere.
    own |= {key: None for key in ("push_to", "push_every", "evaluate_every") if getattr(options, key) is not None}
    steps, instead = _STEPS, dict[str, Any]()
    if isinstance(options, PpoOptions):
        answers = -(-8 // options.answers_per_prompt) * options.answers_per_prompt
        own |= {"batch_size": answers, "micro_batch_size": answers // 2 if answers % 2 == 0 else answers}
        own |= {"total_episodes": None, "max_new_tokens": min(options.max_new_tokens, _TOKENS)}
        own |= {"min_new_tokens": None} if (options.min_new_tokens or 0) > _TOKENS else {}
        steps = 4 * options.ppo_epochs * options.minibatches  # four rollouts
        for key in ("reward", "gold"):
            given = getattr(options, key) or ()
            are_kept = [bool(one.function or one.verify) or _is_small(one.model) for one in given]
            if not all(are_kept):
                instead[key] = [
                    one.model_dump(exclude_unset=True) if kept else {"model": BUILTIN_REWARD, "weight": one.weight}
                    for one, kept in zip(given, are_kept, strict=True)
                ]
        instead |= {"value_init": "policy"} if "reward" in instead and options.value_init == "reward" else {}
        if options.generation.engine == "vllm":
            instead["generation"] = {"engine": "transformers"}
    is_small = _is_small(path) or stage.model.init == "scratch"
    teacher = getattr(options, "teacher", None)
    if teacher is not None:
        is_small &= _is_small(teacher.model)
        kept = teacher.model_dump(exclude_unset=True, exclude={"url"})
        own["teacher"] = kept | {"max_new_tokens": min(teacher.max_new_tokens, _TOKENS)} if teacher.on_policy else kept
    changes: dict[str, Any] = {"launch": {"device": stage.launch.device}}
    if not is_small:
        path = "builtin:tiny-llama"
        changes["model"] = {"path": path}
        own |= {"max_length": 256} if stage.method != "ppo" else {}
        instead |= {"truncate": None} if getattr(options, "truncate", None) else {}
    alignkit = [sys.executable, "-m", "alignkit"]
    with tempfile.TemporaryDirectory(prefix="alignkit-resume-") as folder:
        if teacher is not None and not is_small:  # another one, of the same tokens
            Path(folder, "teacher.yaml").write_text(_TEACHER, encoding="utf-8")
            _run([*alignkit, "sft", "--recipe", f"{folder}/teacher.yaml", "--out", f"{folder}/teacher"])
            instead["teacher"] = own["teacher"] | {"model": f"{folder}/teacher"}
        changes |= {f"{name}.{key}": value for key, value in ({"max_steps": steps} | own | instead).items()}
        command = [*alignkit, stage.method, "--recipe", recipe.path, "--stage", name]
        command += ["--trust-code"] if trust_code else []
        command += [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        _run([*command, "--out", str(whole)])
        process = subprocess.Popen([*command, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and (newest_step(killed / "checkpoints") or 0) < steps // 2:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        step = newest_step(killed / "checkpoints")
        _run([*command, "--out", str(killed)])
        differences = list(find_differences(whole, killed))
    tried = {"stage": name, "model": path, "steps": steps, "killed_at": step, "instead": sorted(instead)}
    return tried | {"differences": differences}


def _is_small(model: str | None) -> bool:
    """Whether a model can be trained here in seconds: one that is built in, or a directory of few bytes."""
    try:
        directory = find_model_dir(model) if model and not model.startswith("builtin:") else None
    except (ModelError, RunError):  # of a stage that has not run
        return False
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors")) if directory else 0
    return bool(model) and (str(model).startswith("builtin:") or 0 < size < _SMALL_BYTES)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.rpartition("error: ")[2].strip()[-2000:]
        raise RunError(f"the try ended with exit code {done.returncode}: {said}")


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
