"""PPO on two processes, with DDP and with FSDP: the curve, the answers and the weights of one process.

And checkpoints that all of them can read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Forks
from ranked_runs import (
    FUNCTIONS,
    KINDS,
    critic_difference,
    largest_difference,
    outcome,
    start,
    weight_difference,
    write_recipe,
)  # fmt: skip

RESUMES = [
    # from, to, kind
    ("one", "ddp", "full"), ("ddp", "ddp", "full"), ("one", "fsdp", "lora"), ("fsdp", "fsdp", "full"),
    ("fsdp", "one", "head"), ("ddp", "one", "lora"),
]  # fmt: skip
FAILING = "reward: {function: 'counting:fail'}"


@pytest.fixture(scope="module")
def runs(forks: Forks, shared_directory: Callable) -> Path:
    """Train everything that the tests of this module look at; return the directory of the runs."""
    return shared_directory("ppo_ranks", lambda directory: train_all(forks, directory))


def train_all(forks: Forks, directory: Path) -> None:
    (directory / "counting.py").write_text(FUNCTIONS)
    jobs: dict[str, list[dict[str, object]]] = {"one": [], "ddp": [], "fsdp": []}
    for strategy, found in jobs.items():
        for name, (top, keys) in KINDS.items():
            recipe = str(write_recipe(directory, name, top, keys))
            if strategy == "one" and name in ("full", "lora"):  # the reward model, whose directory the recipe names
                reward = directory / f"runs-{name}" / "rm"
                found.append({"recipe": recipe, "stage": "rm", "out": str(reward)})
            more = [f"ppo.reward={directory / 'runs-lora' / 'rm'}"] if "lora" in name else []
            more = more or [f"ppo.reward={directory / 'runs-full' / 'rm'}"]
            job = {"recipe": recipe, "stage": "ppo", "out": str(directory / strategy / name), "trust_code": True}
            found.append(job | ({} if "reward: {" in KINDS[name][1] else {"set": more}))
    full = f"ppo.reward={directory / 'runs-full' / 'rm'}"
    lora = f"ppo.reward={directory / 'runs-lora' / 'rm'}"
    for before, after, name in RESUMES:
        jobs[after].append({
            "recipe": str(directory / f"{name}.yaml"), "stage": "ppo", "step": 4,
            "out": str(directory / f"{before}-to-{after}" / name), "from": str(directory / before / name),
            "set": [lora if name == "lora" else full],
        })  # fmt: skip
    failing = str(write_recipe(directory, "failing", "", FAILING))
    jobs["ddp"].append({"recipe": failing, "stage": "ppo", "out": str(directory / "failing"), "trust_code": True})
    later = [job for job in jobs["one"] if "from" in job]
    jobs["one"] = [job for job in jobs["one"] if "from" not in job]
    for strategy, found in jobs.items():
        start(forks, directory, strategy, found)
        shutil.move(directory / "calls.txt", directory / f"calls-{strategy}.txt")
    start(forks, directory, "one", later)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", KINDS)
def test_two_processes_have_the_curve_the_answers_and_the_weights_of_one(name: str, strategy: str, runs: Path) -> None:
    one, two = runs / "one" / name, runs / strategy / name
    found = largest_difference(one, two)
    worst = max(found, key=lambda metric: found[metric])
    weights = weight_difference(one, two)
    print(f"{name:10} {strategy} reward {found['reward']:.1e} loss {found['loss']:.1e} weights {weights:.1e} "
          f"worst {worst} {found[worst]:.1e}")  # fmt: skip
    assert max(found.values()) < 1e-3 and found["response_length"] == 0 and found["num_tokens"] == 0, found
    assert weights < 1e-4 and critic_difference(one, two) < 1e-4
    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert len({row["reward"] for row in rows if "reward" in row}) > 1  # a curve
    assert (one / "samples.jsonl").read_text().count("\n") == (two / "samples.jsonl").read_text().count("\n") > 0


@pytest.mark.parametrize(("before", "after", "name"), RESUMES)
def test_a_run_goes_on_with_other_processes(before: str, after: str, name: str, runs: Path) -> None:
    whole, resumed = runs / before / name, runs / f"{before}-to-{after}" / name
    difference = max(weight_difference(whole, resumed), critic_difference(whole, resumed))
    assert difference < 1e-4 and (before != after or difference == 0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_reward_function_is_called_once_for_all_processes(strategy: str, runs: Path) -> None:
    assert (runs / f"calls-{strategy}.txt").read_text() == (runs / "calls-one.txt").read_text() != ""


def test_the_error_of_a_reward_function_is_told_once(runs: Path) -> None:
    first, second = (outcome(runs, "failing", rank) for rank in range(2))
    assert first["error"] == second["error"] == "RewardError" and "no reward today" in first["text"]
    assert (first["shared"], second["shared"]) == (False, True)
