"""Stages trained by one process or by several, and what their runs differ in; for the tests of many processes."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from forks import Forks
from safetensors.torch import load_file

from alignkit.errors import AlignKitError
from alignkit.recipe import load_recipe, resolve
from alignkit.train.ranks import rank

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
UNEQUAL = ("_runtime", "_per_second", "_seconds", "step_time")  # times, not results

PPO_STEPS = 8  # of four rollouts
RM = (
    "rm: {data: {path: builtin:preferences, max_rows: 16}, batch_size: 4, max_steps: 2, max_length: 160, "
    "learning_rate: 1e-3, samples: {num: 0}}\n"
)
PPO = (
    "data: {path: builtin:prompts, max_rows: 30}, eval: 0.2, batch_size: 8, micro_batch_size: 2, max_new_tokens: 12, "
    f"ppo_epochs: 2, max_steps: {PPO_STEPS}, learning_rate: 1e-3, logging_steps: 1, save_steps: 4, "
    "samples: {num: 2, max_new_tokens: 6}, reward: rm, gold: builtin:true-reward"
)
LORA = "lora: {r: 4, alpha: 8}\n"
KINDS = {  # of ppo stages
    # name: what is said at the top, and more keys of the stage
    "full": ("", "missing_eos: {penalty: 1}, kl_target: 4, reward_normalize: gain_and_bias, reward_normalize_rows: 20"),
    "lora": (LORA, "whiten_rewards: true"),
    "head": ("", "value_init: head, ema: 0.9, ptx: {data: {path: builtin:reviews, max_rows: 40}, coef: 0.5}"),
    "head-lora": (LORA, "value_init: policy, minibatches: 2"),
    "dapo": (
        LORA,
        "preset: dapo, num_generations: 2, minibatches: 2, dynamic_sampling: 2, kl_coef: 0.05, kl_in: loss, "
        "top_p: 0.9, importance: sequence, overlong: {penalty: 0.1}, reward: {function: 'counting:coarse'}",
    ),
    "rloo": (LORA, "advantage: rloo, num_generations: 4, reward: {function: 'counting:score'}"),
}
FUNCTIONS = """
import pathlib

def score(prompts, completions, **columns):
    with (pathlib.Path(__file__).parent / "calls.txt").open("a") as file:
        file.write(f"{len(completions)}\\n")
    mean = sum(map(len, completions)) / len(completions)  # it looks at all answers together
    return [len(str(text)) - mean for text in completions]

def coarse(prompts, completions):
    return [len(str(text)) // 30 for text in completions]  # many are equal

def fail(prompts, completions, **columns):
    raise ValueError("no reward today")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(forks: Forks, directory: Path, strategy: str, jobs: list[dict[str, Any]], *, processes: int = 2) -> None:
    """Train jobs one after another, all in one process or all in several.

    Each names recipe, stage and out; `from` and `step` go on from another run's checkpoint, `terminate` sends SIGTERM
    to one rank at a step, `rank_set` overrides values on one rank. How it ended is in `<out>.outcome-RANK.json`.
    """
    (directory / f"{strategy}.json").write_text(json.dumps(jobs))
    process = {"main": "ranked_runs:train_listed", "argv": ["", f"{strategy}.json"], "cwd": str(directory)}
    environment = os.environ | (FSDP if strategy == "fsdp" else {})
    if strategy != "one":
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    started = []
    for number in map(str, range(1 if strategy == "one" else processes)):
        mine = {} if strategy == "one" else {"RANK": number, "LOCAL_RANK": number}
        log = str(directory / f"{strategy}-{number}.txt")
        started.append(process | {"env": environment | mine, "stdout": log, "stderr": log})
    codes = forks.run(*started, timeout=1800)
    assert not any(codes), [Path(each["stderr"]).read_text()[-3000:] for each in started]


def train_listed() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        began = time.monotonic()
        outcome = run(job)
        Path(f"{job['out']}.outcome-{rank()}.json").write_text(json.dumps(outcome))
        print(f"{rank()} {job['out']} {time.monotonic() - began:.1f} s {outcome}", file=sys.stderr, flush=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    out = Path(job["out"])
    if rank() == 0:
        copy_checkpoint(job, out)
    overrides = [*job.get("set", ()), *job.get("rank_set", {}).get(str(rank()), ())]
    recipe = load_recipe(Path(job["recipe"]), overrides=overrides)
    stage = resolve(recipe, job["stage"], out=out, trust_code=job.get("trust_code", False))
    if "terminate" in job and job["terminate"]["rank"] == rank():
        threading.Thread(target=terminate_at, args=(out, job["terminate"]["step"]), daemon=True).start()
    try:
        result = importlib.import_module(f"alignkit.train.{stage.method}").run(stage, Path(stage.run_dir))
    except AlignKitError as error:
        return {"error": type(error).__name__, "text": str(error), "code": error.exit_code, "shared": error.shared}
    return {"step": result.step, "metrics": result.metrics}


def copy_checkpoint(job: dict[str, Any], out: Path) -> None:
    """Make a run that was stopped at a step out of one that went on."""
    out.mkdir(parents=True, exist_ok=True)
    if "from" not in job:
        return
    shutil.copytree(job["from"], out, dirs_exist_ok=True)
    for path in (out / "result.json", out / "probe.json"):
        path.unlink()
    shutil.rmtree(out / "model")
    for path in (out / "checkpoints").glob("checkpoint-*"):
        if path.name != f"checkpoint-{job['step']}":
            shutil.rmtree(path)


def terminate_at(out: Path, step: int) -> None:
    """Send this process SIGTERM once the metrics tell that the step was taken."""
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


def read_curve(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without times."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if not name.endswith(UNEQUAL)} for row in rows]


def largest_difference(first: Path, second: Path) -> dict[str, float]:
    """Return for each metric the largest difference between two runs at any step."""
    rows = list(zip(read_curve(first), read_curve(second), strict=True))
    assert rows and all(one.keys() == other.keys() for one, other in rows)
    found: dict[str, float] = {}
    for one, other in rows:
        for name in one:
            found[name] = max(found.get(name, 0.0), abs(one[name] - other[name]))
    return found


def read_weights(run: Path) -> dict[str, Any]:
    (path,) = (run / "model").glob("*model.safetensors")
    return load_file(path)


def weight_difference(first: Path, second: Path) -> float:
    one, other = read_weights(first), read_weights(second)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def outcome(runs: Path, name: str, number: int) -> dict[str, Any]:
    return json.loads((runs / f"{name}.outcome-{number}.json").read_text())


def write_recipe(directory: Path, name: str, top: str, keys: str) -> Path:
    path = directory / f"{name}.yaml"
    body = PPO.replace("reward: rm, ", "") if "reward: {" in keys else PPO
    path.write_text(f"name: ranks\nmodel: {{path: builtin:tiny-llama}}\n{top}{RM}ppo: {{{body}, {keys}}}\n")
    return path


def critic_difference(one: Path, two: Path) -> float:
    files = [sorted((run / "model" / "critic").glob("*.safetensors")) for run in (one, two)]
    assert len(files[0]) == len(files[1])
    first, second = ({k: v for file in found for k, v in load_file(file).items()} for found in files)
    assert first.keys() == second.keys()
    return max((float((first[name] - second[name]).abs().max()) for name in first), default=0.0)
