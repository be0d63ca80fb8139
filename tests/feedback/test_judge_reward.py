from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import messages, read_rows
from judge_server import Server

from alignkit.errors import JudgeError, Stopped
from alignkit.launch.run import launch_stage
from alignkit.recipe import load_recipe, resolve
from alignkit.recipe.schema import FeedbackModel, RewardSource
from alignkit.recipe.stage import Stage
from alignkit.rewards import Answers, Workspace
from alignkit.rewards.kinds.judge import JudgeReward, log_odds
from alignkit.runs.directory import find_damage, list_checkpoints, step_of

MakeStage = Callable[..., Stage]
PROMPTS = [messages(f"Film {number}?") for number in range(3)]


def open_judge(stage: Stage, judge: FeedbackModel, constitution: str) -> Callable[[list, list], list[float]]:
    reward = JudgeReward(RewardSource(judge=judge, constitution=constitution), Workspace(stage=stage))
    return lambda prompts, completions: reward.score(Answers(prompts, completions))


@pytest.fixture
def stage(make_stage: MakeStage, chat_model: Path) -> Stage:
    return make_stage(
        "ppo", start=chat_model, data="builtin:prompts", reward={"model": "builtin:true-reward"}, max_new_tokens=6
    )


def judge_at(server: Server, **options: Any) -> FeedbackModel:
    return FeedbackModel(url=server.url, name="tiny", **options)


def test_log_odds_against_the_answer_the_policy_began_with(stage: Stage, constitution: str, tmp_path: Path) -> None:
    with Server() as server:  # it prefers the longer answer, with 0.9
        reward = open_judge(stage, judge_at(server), constitution)
        answers = [messages("", "word " * 40)[1:], messages("", "")[1:], messages("", "x")[1:]]
        found = reward(PROMPTS, answers)
        assert found[0] == pytest.approx(math.log(9), rel=1e-6)
        assert found[1] == log_odds(0.0) == pytest.approx(-9.21, abs=0.01)  # an empty answer
        assert found[2] == pytest.approx(-math.log(9), rel=1e-6)
        assert server.requests == 4
        assert reward(PROMPTS, answers) == found and server.requests == 4  # nothing is asked twice
    again = open_judge(stage, judge_at(server), constitution)  # the server is gone by now
    assert again(PROMPTS, answers) == found
    kinds = [record["kind"] for record in read_rows(Path(stage.run_dir) / "judged.jsonl")]
    assert sorted(kinds) == ["baseline"] * 2 + ["label"] * 4


def test_an_answer_like_the_baseline_is_worth_nothing(stage: Stage, constitution: str, tmp_path: Path) -> None:
    with Server(judge=lambda payload: 0.8) as server:  # it prefers the first place: both orders take that out
        reward = open_judge(stage, judge_at(server), constitution)
        assert reward(PROMPTS[:1], [messages("", "anything")[1:]]) == [pytest.approx(0.0, abs=1e-9)]


def test_a_local_judge_shares_the_model_of_the_baseline(
    stage: Stage, constitution: str, tmp_path: Path, chat_model: Path
) -> None:
    reward = open_judge(stage, FeedbackModel(model=str(chat_model)), constitution)
    found = reward(PROMPTS, [messages("", text)[1:] for text in ("good", "bad", "good")])
    assert len(found) == 3 and all(math.isfinite(value) for value in found)


def test_a_judge_that_abstains_from_everything_ends_the_run(stage: Stage, constitution: str, tmp_path: Path) -> None:
    with Server(reply=lambda payload: "I cannot say.") as server:
        reward = open_judge(stage, judge_at(server), constitution)
        with pytest.raises(JudgeError, match="abstains from all 1 answers: the reply names neither option, or both"):
            reward(PROMPTS[:1], [messages("", "x")[1:]])


RECIPE = """
name: judged
model: {path: MODEL}
launch: {device: cpu}
ppo:
  data: {path: builtin:prompts, max_rows: 8}
  reward: {judge: {url: 'URL', name: slow, timeout: 60, concurrency: 2}, constitution: FILE}
  batch_size: 4
  micro_batch_size: 4
  ppo_epochs: 1
  max_new_tokens: 6
  max_steps: 3
  save_steps: 100
  samples: {num: 0}
"""


@pytest.mark.slow
def test_a_silent_judge_does_not_delay_ctrl_c_and_the_last_step_is_saved(
    constitution: str, tmp_path: Path, chat_model: Path
) -> None:
    limit = 1 << 30
    with Server(fault=lambda number, payload: "timeout" if number >= limit else None, hang=60) as server:
        recipe = tmp_path / "a.yaml"
        recipe.write_text(
            RECIPE.replace("URL", server.url).replace("FILE", constitution).replace("MODEL", str(chat_model))
        )
        whole, stopped = (resolve(load_recipe(recipe), "ppo", out=tmp_path / name) for name in ("whole", "stopped"))
        launch_stage(whole)
        limit = 2 * server.requests - 1  # the second run's last verdict does not come
        sent: list[float] = []

        def interrupt() -> None:
            while server.requests <= limit and time.monotonic() < began + 60:
                time.sleep(0.01)
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        began = time.monotonic()
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(Stopped, match="stopped by SIGINT") as caught:
            launch_stage(stopped)
        assert caught.value.exit_code == 130
        assert time.monotonic() - sent[0] < 3  # half a second for what is under way, and the checkpoint
        thread.join()
        kept = list_checkpoints(tmp_path / "stopped" / "checkpoints")
        assert [step_of(path) for path in kept] == [2] and find_damage(kept[0]) is None
        limit = 1 << 30
        launch_stage(stopped)
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert models[0] == models[1]
