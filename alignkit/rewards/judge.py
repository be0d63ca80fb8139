"""A judge as the reward of PPO: how much better it finds an answer than the answer the policy began with.

The question is the labels' own, so that one judge and one format of prompts serve both; an absolute question would
need another wording of every principle, and a judge trained for it. The baseline is the greedy answer of the model that
PPO starts from: an answer as good as that is worth 0. The reward is the log-odds of the judge, both orders averaged, so
that a preference for a place takes no part in it. Everything asked is kept: nothing is asked twice.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignkit.data import Text
from alignkit.errors import JudgeError, RewardError
from alignkit.feedback.cache import Desk, Store
from alignkit.feedback.constitution import load_constitution
from alignkit.feedback.examples import Examples
from alignkit.feedback.judge import Judge, Pairing, judge_all
from alignkit.feedback.prompts import Quoter, ask_answer, read_text
from alignkit.feedback.replay import pair_key
from alignkit.feedback.writer import Job, Model, Sampling, open_model, own_model, spent_before
from alignkit.recipe.schema import FeedbackModel, PpoOptions
from alignkit.recipe.stage import Stage
from alignkit.runs.stop import Stop

STORE = "judged.jsonl"
_WORST = 1e-4  # a probability from which the log-odds go no further: 9.2 nats
_BATCH = 16

Reward = Callable[[Sequence[Text], Sequence[Text]], list[float]]


class JudgeReward:
    """Call it with prompts and answers, as rows have them; it returns one number for each.

    An empty answer is not put to the judge: it gets the lowest reward there is. So does one that the judge abstains
    from, or that is too long for it: it must not pay to confuse the judge.
    """

    def __init__(self, desk: Desk, judge: Judge, baseline: Model, *, max_new_tokens: int) -> None:
        self._desk, self._judge, self._baseline = desk, judge, baseline
        self._sampling = Sampling(0.0, max_new_tokens)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """Return the rewards; raises JudgeError when the judge gave up, or abstains from everything."""
        answers = [read_text(completion).strip() for completion in completions]
        asked = [place for place, answer in enumerate(answers) if answer]
        baselines = self._answer([prompts[place] for place in asked])
        pairings = [
            Pairing(prompts[place], answers[place], base, "", pair_key(prompts[place], answers[place], base))
            for place, base in zip(asked, baselines, strict=True)
        ]
        labels = judge_all(self._desk, self._judge, pairings)
        if labels and all(label.p_first is None for label in labels):
            raise JudgeError(f"the judge abstains from all {len(labels)} answers: {labels[0].problem}")
        rewards = [log_odds(0.0)] * len(answers)
        for place, label in zip(asked, labels, strict=True):
            values = [log_odds(value) for value in label.orders if value is not None]
            if values and label.p_first is not None:
                rewards[place] = sum(values) / len(values)
        return rewards

    def _answer(self, prompts: Sequence[Text]) -> list[str]:
        """Return the greedy answer of the baseline to each prompt."""
        jobs = [Job(ask_answer(prompt), 0) for prompt in prompts]
        about: list[dict[str, Any]] = [{} for _ in jobs]
        replies = self._desk.write(self._baseline, jobs, self._sampling, kind="baseline", by="generator", about=about)
        return [reply.text.strip() for reply in replies]


def log_odds(p: float) -> float:
    """Return log(p / (1 - p)), bounded: one sure judgement must not drown all others."""
    p = min(max(p, _WORST), 1.0 - _WORST)
    return math.log(p / (1.0 - p))


def build_reward(
    stage: Stage,
    judge: FeedbackModel,
    constitution: str | Sequence[str],
    directory: Path,
    *,
    where: str | None = None,
) -> Reward:
    """Return the reward that a judge gives in a ppo stage; what it says is kept in `<directory>/judged.jsonl`.

    Raises RecipeError for a constitution that cannot be used, ModelError or EnvironmentProblem for a judge.
    """
    options = stage.expect(PpoOptions)
    if judge.replay is not None:
        raise RewardError("published labels cannot judge new answers; give the judge a model or a url", where=where)
    principles = load_constitution(constitution, needs="comparison")
    stop = Stop()
    if threading.current_thread() is threading.main_thread():
        stop.listen()
    rank = os.environ.get("RANK", "0")
    store = Store(directory / (STORE if rank == "0" else f"judged-rank-{rank}.jsonl"))  # each process writes its own

    def open_source(source: FeedbackModel, by: str) -> Model:
        return open_model(
            source, stop=stop, spending=spent_before(source, store.values(), (by,)), device=stage.launch.device,
            batch_size=_BATCH, trust_code=stage.trust_code,
        )  # fmt: skip

    own = own_model(stage)
    baseline = open_source(own, "generator")
    model = baseline if judge.model == own.model else open_source(judge, "judge")
    asked = Judge(model, principles, Examples(), Quoter(model.control_tokens), stage.seed)
    return JudgeReward(Desk(stage.name, store, stop), asked, baseline, max_new_tokens=options.max_new_tokens)
