"""Labels by a reward of any kind: Bradley-Terry's probability of its weighted sum."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignkit.errors import DataError, RecipeError
from alignkit.launch.run import launch_stage
from alignkit.models.start import builtin_config, builtin_tokenizer
from alignkit.recipe import load_recipe, resolve
from alignkit.rewards.kinds import check_rewards
from alignkit.rewards.label import find_changes

RECIPE = """name: a
model: {path: builtin:tiny-gpt2}
label:
  answers: given
  REWARD
  data: pairs.jsonl
"""
ROWS = [
    {"prompt": "The film? ", "chosen": "awful", "rejected": "superb"},
    {"prompt": "The plot? ", "chosen": "superb", "rejected": "a superb superb plot"},  # equally good to the toy world
]
SUM = "reward: [{model: builtin:true-reward, weight: 2}, {function: 'lengths:score', weight: 0.1}]"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "lengths.py").write_text("def score(prompts, completions):\n    return [len(c) for c in completions]\n")

    def make(reward: str) -> Path:
        (tmp_path / "a.yaml").write_text(RECIPE.replace("REWARD", reward))
        return tmp_path / "a.yaml"

    return make


def test_a_weighted_sum_of_rewards_labels_pairs(write: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = load_recipe(write(SUM))
    with pytest.raises(Exception, match="the reward function lengths:score is code"):
        check_rewards(resolve(recipe, "label"))
    stage = resolve(recipe, "label", out=tmp_path / "run", trust_code=True)
    launch_stage(stage)
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    first = 2 * 2 + 0.1 * (len("superb") - len("awful"))  # true reward 1 and -1
    second = 0.1 * (len("a superb superb plot") - len("superb"))
    assert [row["chosen"] for row in rows] == ["superb", "a superb superb plot"]
    assert [row["label"] for row in rows] == pytest.approx([1 / (1 + math.exp(-first)), 1 / (1 + math.exp(-second))])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["labelled"], list(report["principles"])) == (2, ["true_reward + score"])
    assert launch_stage(stage).metrics["rows"] == 2 and find_changes(stage, tmp_path / "run") == []
    (tmp_path / "lengths.py").write_text("def score(prompts, completions):\n    return [0 for c in completions]\n")
    assert "reward_weights" in find_changes(stage, tmp_path / "run")[0]  # another function is another reward


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("reward: builtin:true-reward\n  orders: one", "label.orders has no effect with reward:, which compares by"),
        ("reward: builtin:true-reward\n  judge: x/y", "label.judge has no effect with reward:"),
        ("reward: {judge: x/y, constitution: builtin:helpfulness}", "label.reward has a judge, which compares answers"),
        ("reward: {function: f}", "label.reward names the function 'f'; write pkg.module:name"),
        ("judge: x/y", "label.constitution is missing; give builtin:harmlessness or a file"),
        ("constitution: builtin:helpfulness", "label.judge is missing; name a model"),
    ],
)  # fmt: skip
def test_a_judge_or_a_reward_compares(write: Callable[[str], Path], keys: str, problem: str) -> None:
    with pytest.raises((RecipeError, DataError)) as caught:
        load_recipe(write(keys))
    assert problem in str(caught.value)


def test_the_best_of_sampled_answers_becomes_a_row_and_rewards_see_the_columns(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(builtin_config("builtin:tiny-gpt2")).save_pretrained(tmp_path / "policy")
    builtin_tokenizer().save_pretrained(tmp_path / "policy")
    (tmp_path / "shorts.py").write_text(
        "def score(prompts, completions, answer):\n"
        "    assert [str(eval(p.rstrip('='))) for p in prompts] == answer\n"
        "    return [min(len(c), 12) for c in completions]\n"
    )
    path = write("reward: {function: 'shorts:score'}\n  best_of: true\n  start_from: ./policy\n  max_new_tokens: 6")
    path.write_text(path.read_text().replace("given", "3").replace("pairs.jsonl", "builtin:arithmetic?rows=12"))
    launch_stage(resolve(load_recipe(path), "label", out=tmp_path / "run", trust_code=True))
    rows, labels = (
        [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
        for name in ("rows.jsonl", "labels.jsonl")
    )
    found = {row["prompt"]: min(len(row["completion"]), 12) for row in rows}
    sizes: dict[str, set[int]] = {}
    for label in labels:
        sizes.setdefault(label["prompt"], set()).update(min(len(label[key]), 12) for key in ("first", "second"))
    assert found == {prompt: max(own) for prompt, own in sizes.items() if len(own) > 1} and len(found) > 2
