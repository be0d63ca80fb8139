"""A PPO run that is killed or stopped ends with the policy and the critic of an undisturbed one, bit for bit."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from alignkit.recipe import Stage, load_recipe, resolve
from alignkit.runs.directory import find_damage, list_checkpoints, step_of

# Six rollouts of two optimizer steps; everything that has a state is switched on.
RECIPE = """
name: faults
model: {{path: builtin:tiny-llama{quantization}}}
{lora}
rm:
  data: {{path: builtin:preferences, max_rows: 16}}
  batch_size: 4
  max_steps: 2
  max_length: 160
  learning_rate: 1e-3
  samples: {{num: 0}}
ppo:
  data: {{path: builtin:prompts, max_rows: 16}}
  reward: {reward}
  reward_normalize: gain_and_bias
  reward_normalize_rows: 8
  kl_target: 0.5
  kl_horizon: 40
  {extra}
  batch_size: 4
  micro_batch_size: 2
  ppo_epochs: 2
  max_new_tokens: 8
  max_steps: 12
  save_steps: 1
  logging_steps: 4
  learning_rate: 3e-3
  samples: {{num: 0}}
"""
KINDS = {
    "full": ("", "", "rm", "ema: 0.9\n  ptx: {data: {path: builtin:reviews, max_rows: 20}, coef: 0.5, batch_size: 2}"),
    "lora": ("", "lora: {r: 4, alpha: 8}", "rm", ""),
    "head": ("", "lora: {r: 4, alpha: 8}", "builtin:true-reward", "ema: 0.9"),
    "dapo": (
        "",
        "",
        "builtin:true-reward",
        "preset: dapo\n  num_generations: 2\n  minibatches: 1\n  kl_coef: 0.05\n  "
        "dynamic_sampling: 2\n  kl_in: loss\n  top_p: 0.9\n  stop: ' t'",
    ),
    "grpo": (  # half of the groups have one reward, and are drawn again
        "",
        "",
        "{verify: regex}",
        "preset: grpo\n  num_generations: 2\n  minibatches: 1\n  dynamic_sampling: 3\n  kl_coef: 0.05",
    ),
    "qlora": (", quantization: nf4", "lora: {r: 4, alpha: 8}", "rm", ""),
}


@pytest.fixture
def warm_ppo(warm: None) -> None:
    import alignkit.train.ppo  # noqa: F401


@pytest.fixture
def make_ppo(tmp_path: Path, run: Callable, warm_ppo: None) -> Callable[[str, str], Stage]:
    """Return a function that resolves the ppo stage of a kind into a directory, its reward model trained once."""

    def make(kind: str, out: str) -> Stage:
        quantization, lora, reward, extra = KINDS[kind]
        path = tmp_path / f"{kind}.yaml"
        text = RECIPE.format(quantization=quantization, lora=lora, reward=reward, extra=extra)
        if "verify" in reward:
            rows = [{"prompt": f"Write {number}.", "pattern": "[a-h]"} for number in range(16)]
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            text = text.replace("{path: builtin:prompts, max_rows: 16}", "rows.jsonl")
        path.write_text(text)
        if reward == "rm" and not (tmp_path / "runs" / "faults" / "rm" / "result.json").exists():
            ended = run(resolve(load_recipe(path), "rm"))
            assert ended.code == 0, ended.stderr
        return resolve(load_recipe(path), "ppo", out=tmp_path / out)

    return make


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def digest(run_dir: Path) -> str:
    """Return a digest of the final policy and critic."""
    found = hashlib.sha256()
    files = sorted((run_dir / "model").rglob("*.safetensors"))
    has_critic = not any((run_dir.parent / f"{kind}.yaml").exists() for kind in ("dapo", "grpo"))
    assert len(files) >= 1 + has_critic, f"policy and critic are not both below {run_dir}"
    for file in files:
        found.update(str(file.relative_to(run_dir)).encode() + file.read_bytes())
    return found.hexdigest()


def last_kl_coef(run_dir: Path) -> float:
    newest = list_checkpoints(run_dir / "checkpoints")[0]
    return float(json.loads((newest / "ppo_state.json").read_text())["kl_coef"])


def check_kills(kind: str, make_ppo: Callable, run: Callable, tmp_path: Path, *, num_kills: int, seed: int) -> int:
    whole = run(make_ppo(kind, "whole"))
    assert whole.code == 0, whole.stderr
    expected, coef = digest(tmp_path / "whole"), last_kl_coef(tmp_path / "whole")
    assert coef != 0.05  # the controller has moved
    rng, hits, longest = random.Random(seed), 0, whole.seconds
    for part in range(14):
        out = f"killed{part}"
        for _ in range(3):
            ended = run(make_ppo(kind, out), kill_after=rng.uniform(0.3, longest * 0.9))
            hits += ended.code == -signal.SIGKILL
            if ended.code == 0:  # it came to its end first: the machine is less busy now
                longest = min(longest, max(ended.seconds, 1.0))
        ended = run(make_ppo(kind, out))
        assert ended.code == 0, ended.stderr
        assert digest(tmp_path / out) == expected
        assert last_kl_coef(tmp_path / out) == coef
        if hits >= num_kills:
            break
    return hits


def test_kills_leave_policy_and_critic_bit_identical(make_ppo: Callable, run: Callable, tmp_path: Path) -> None:
    assert check_kills("head", make_ppo, run, tmp_path, num_kills=2, seed=1) >= 2


def test_another_batch_size_in_a_run_that_has_begun_is_refused(
    make_ppo: Callable, run: Callable, tmp_path: Path
) -> None:
    assert run(make_ppo("head", "run")).code == 0
    stage = make_ppo("head", "run")
    changed = replace(stage, options=stage.options.model_copy(update={"batch_size": 8}))
    ended = run(changed, allow_change=("batch_size",))
    assert (
        ended.code == 2
        and "ppo.batch_size: 4 -> 8 (it decides which step is of which rollout: not to be changed" in ended.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_kills_leave_policy_and_critic_bit_identical(
    kind: str, make_ppo: Callable, run: Callable, tmp_path: Path
) -> None:
    hits = check_kills(kind, make_ppo, run, tmp_path, num_kills=10, seed=2)
    if kind == "grpo":
        rows = map(json.loads, (tmp_path / "whole/metrics.jsonl").read_text().splitlines())
        assert sum(row.get("resampled_groups", 0) for row in rows) > 0
    print(f"ppo {kind}: {hits} kills, all exact")
    assert hits >= 10


@pytest.mark.slow
def test_sigterm_inside_a_rollout_saves_at_its_end_and_goes_on(
    make_ppo: Callable, run: Callable, tmp_path: Path
) -> None:
    whole = run(make_ppo("full", "whole"))
    assert whole.code == 0, whole.stderr
    for number, share in enumerate((0.3, 0.4, 0.5, 0.6, 0.7)):
        out = f"stopped{number}"
        ended = run(make_ppo("full", out), kill_after=whole.seconds * share, number=signal.SIGTERM)
        assert ended.code in (0, 143), ended.stderr
        for path in list_checkpoints(tmp_path / out / "checkpoints"):
            assert step_of(path) % 2 == 0 and find_damage(path) is None
        assert run(make_ppo("full", out)).code == 0
        assert digest(tmp_path / out) == digest(tmp_path / "whole")
