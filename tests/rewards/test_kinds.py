"""What is said of a reward before anything is trained: by a launch, without torch, and by `check`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import alignkit
from alignkit.errors import RewardError
from alignkit.preflight.check import check_recipe
from alignkit.recipe import Stage, load_recipe, resolve
from alignkit.rewards.kinds import check_rewards, describe_reward

RECIPE = """name: a
model: {path: builtin:tiny-gpt2}
rm: {data: {path: builtin:preferences, max_rows: 20}}
ppo:
  reward: REWARD
  data: {path: builtin:prompts, max_rows: 20}
"""
BREVITY = '''"""1 for a short answer."""


class Brevity:
    name = "brevity"

    def __init__(self, source, space):
        self._longest = int(source.brevity)

    def score(self, answers):
        return [float(len(text) <= self._longest) for text in answers.completions]

    @staticmethod
    def check(source, stage, key, coming=None):
        return f"at most {source.brevity} characters"

    @staticmethod
    def fingerprint(source, stage):
        return None


KIND = Brevity
'''
SEES_TORCH = "import sys; from alignkit.cli import main; code = main(); print('torch' in sys.modules); sys.exit(code)"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    monkeypatch.chdir(tmp_path)

    def make(reward: str, *, trust: bool = False) -> Stage:
        (tmp_path / "a.yaml").write_text(RECIPE.replace("REWARD", reward))
        return resolve(load_recipe(tmp_path / "a.yaml"), "ppo", trust_code=trust)

    return make


def write_model(folder: Path, kind: str, weights: str = "model.safetensors") -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [kind], "model_type": "gpt2"}))
    header = b"{}"
    (folder / weights).write_bytes(len(header).to_bytes(8, "little") + header)


def test_all_problems_of_the_rewards_come_at_once(stage: Callable[..., Stage], tmp_path: Path) -> None:
    write_model(tmp_path / "policy", "GPT2LMHeadModel")
    write_model(tmp_path / "pickled", "GPT2ForSequenceClassification", "pytorch_model.bin")
    with pytest.raises(RewardError) as caught:
        check_rewards(stage("[rm, ./policy, ./pickled, {function: 'm:f'}, ./absent]"))
    lines = str(caught.value).split("\n")
    assert lines[0] == (
        "a.yaml:5: ppo.reward is rm, which has not been trained to its end; train --stage rm of a.yaml first, or name "
        "another reward"
    )
    assert lines[1] == (
        f"a.yaml:5: ppo.reward is {tmp_path}/policy, a language model; a reward is an rm stage or a classifier "
        "of answers"
    )
    assert lines[2].startswith(f"a.yaml:5: ppo.reward: {tmp_path}/pickled: weights only as pickles (pytorch_model.bin)")
    assert "the reward function m:f is code, which a recipe cannot allow" in lines[3]
    assert lines[4] == (
        f"a.yaml:5: ppo.reward: {tmp_path}/absent does not exist; give a hub id, a local directory, or a builtin name"
    )


def test_good_rewards_pass(stage: Callable[..., Stage], tmp_path: Path) -> None:
    write_model(tmp_path / "rm_x", "GPT2ForSequenceClassification")
    check_rewards(stage("[./rm_x, builtin:true-reward]"))
    check_rewards(stage("{function: 'm:f'}", trust=True))  # it is imported when the stage is built


def test_sources_are_described(stage: Callable[..., Stage], tmp_path: Path) -> None:
    made = stage("[rm, {model: builtin:true-reward, weight: 0.5}]")
    assert [describe_reward(made, key, source) for key, source in made.rewards] == [
        "rm, not trained yet", "the toy world's true reward, times 0.5",
    ]  # fmt: skip
    (tmp_path / "score_me.py").write_text("def f(prompts, completions):\n    return []\n")
    made = stage("{function: 'score_me:f'}", trust=True)
    assert [describe_reward(made, key, source) for key, source in made.rewards] == ["function score_me:f"]


def test_a_launch_refuses_before_torch_is_loaded(run_python: Callable, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(RECIPE.replace("REWARD", "{function: 'm:f'}"))
    ended = run_python("-c", SEES_TORCH, "ppo", "-r", "a.yaml")
    assert (ended.returncode, ended.stdout) == (2, "False\n"), ended.stderr
    assert ended.stderr == (
        "error: a.yaml:5: the reward function m:f is code, which a recipe cannot allow; read it, and give --trust-code "
        "on the command line\n"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_check_covers_prompts_rewards_and_lengths(stage: Callable[..., Stage], tmp_path: Path) -> None:
    stage("[rm, {function: 'm:f'}]")
    report = check_recipe(load_recipe(tmp_path / "a.yaml"))
    (ppo,) = (found for found in report.stages if found.method == "ppo")
    assert ppo.facts == {}  # what a start refuses comes first, and at once
    assert "the reward function m:f is code, which a recipe cannot allow" in str(ppo.problems)
    many = ["ppo.reward=rm", "ppo.max_new_tokens=490", "ppo.max_truncated=0"]
    report = check_recipe(load_recipe(tmp_path / "a.yaml", overrides=many))
    (ppo,) = (found for found in report.stages if found.method == "ppo")
    assert ppo.facts["reward"] == "rm, not trained yet"
    said = "\n".join(map(str, ppo.problems))
    assert "of the prompts are longer than the 22 tokens that ppo.max_new_tokens leaves of the model's context" in said
    good = check_recipe(load_recipe(tmp_path / "a.yaml", overrides=["ppo.reward=rm"]))
    (ppo,) = (found for found in good.stages if found.method == "ppo")
    assert ppo.problems == [] and ppo.facts["tokens"].endswith(", all in prompts")


def test_a_new_kind_is_one_file(tmp_path: Path) -> None:
    shutil.copytree(Path(alignkit.__file__).parent, tmp_path / "alignkit", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "alignkit" / "rewards" / "kinds" / "brevity.py").write_text(BREVITY)
    (tmp_path / "a.yaml").write_text(RECIPE.replace("REWARD", "[{brevity: '4'}, {model: rm, weight: 2}]"))
    code = """
from alignkit.recipe import load_recipe, resolve
from alignkit.recipe.schema import RewardSource
from alignkit.rewards import Answers, Workspace
from alignkit.rewards.kinds import describe_reward, open_reward
stage = resolve(load_recipe("a.yaml"), "ppo")
source = stage.options.reward[0]
print(describe_reward(stage, "reward", source))
print(open_reward(source, Workspace()).score(Answers(["p", "p"], ["ab", "abcdef"])))
print(RewardSource.model_fields["brevity"].description)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["at most 4 characters", "[1.0, 0.0]", "1 for a short answer."], done.stderr
    wrong = RECIPE.replace("REWARD", "{brevity: '4', verify: exact}")
    (tmp_path / "a.yaml").write_text(wrong)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "needs exactly one of model, function, judge, verify and brevity for each part, and has" in done.stderr
