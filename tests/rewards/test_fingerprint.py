"""A judge among the sources of a reward: what it is called, and what of it a run is told apart by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.recipe import Stage, load_recipe, resolve
from alignkit.rewards.kinds import fingerprint_rewards

RECIPE = """\
name: a
model: {path: builtin:tiny-gpt2}
ppo:
  data: builtin:prompts
  reward:
    - {judge: {url: 'http://127.0.0.1:1/v1', name: m}, constitution: CONSTITUTION, weight: 2}
    - builtin:true-reward
"""


@pytest.fixture
def stage(tmp_path: Path) -> Callable[[str], Stage]:
    def make(constitution: str) -> Stage:
        (tmp_path / "a.yaml").write_text(RECIPE.replace("CONSTITUTION", constitution))
        return resolve(load_recipe(tmp_path / "a.yaml"), "ppo")

    return make


def test_other_principles_are_another_reward(stage: Callable[[str], Stage], tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("principles: [{name: kind, comparison: Which answer is kinder?}]\n")
    before = fingerprint_rewards(stage("mine.yaml"))
    assert before == fingerprint_rewards(stage("mine.yaml"))
    mine.write_text("principles: [{name: kind, comparison: Which answer is less kind?}]\n")
    assert fingerprint_rewards(stage("mine.yaml")) != before
    assert before["reward_weights"][1] is None  # the toy world's own has no bytes


def test_a_critic_starts_from_the_policy_where_a_judge_scores(stage: Callable[[str], Stage]) -> None:
    options = stage("builtin:helpfulness").options
    assert options.critic_start == "policy"  # type: ignore[attr-defined]
