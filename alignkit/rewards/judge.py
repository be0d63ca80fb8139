"""A language model that judges as the reward of PPO."""

import math
import os
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from alignkit.errors import JudgeError, RewardError
from alignkit.feedback.cache import Asker, Store
from alignkit.feedback.constitution import Examples, load_constitution
from alignkit.feedback.judge import Judge, Pairing, judge_all, pair_key
from alignkit.feedback.prompts import Quoter, ask_answer, read_text
from alignkit.feedback.stage import describe_model, open_model, own_model
from alignkit.feedback.writer import Job, Model, Sampling
from alignkit.models.files import find_model_dir, fingerprint_weights
from alignkit.recipe import Stage
from alignkit.recipe.schema import FeedbackModel, PpoOptions, RewardSource
from alignkit.rewards.base import Answers, Workspace
from alignkit.runs.stop import Stop

STORE = "judged.jsonl"
_WORST = 1e-4  # a probability from which the log-odds go no further: 9.2 nats


class JudgeReward:
    """Log-odds of a judge preferring an answer to the greedy answer of the model that PPO starts from.

    The question is that of labels, so that one judge and one format of prompts serve both; both orders are averaged, so
    that a preference for a place takes no part. An answer as good as the baseline is worth 0. An empty answer is not
    put to the judge: it gets the lowest reward there is. So does one that the judge abstains from, or that is too long
    for it: it must not pay to confuse the judge. What was asked is kept in judged.jsonl of the run, and not asked
    again.
    """

    name = "judge"

    def __init__(self, source: RewardSource, space: Workspace) -> None:
        """Open the judge, in the one process that asks."""
        stage, judge = space.stage, source.judge
        assert judge is not None
        if stage is None:
            raise RewardError("a judge compares; name it as the judge of a win rate", where=space.where)
        if judge.replay is not None:
            what = "published labels cannot judge new answers; give the judge a model or a url"
            raise RewardError(what, where=space.where)
        self._stage, self._once = stage, space.once
        self._sampling = Sampling(0.0, stage.expect(PpoOptions).max_new_tokens)
        self._constitution, self._source = source.constitution or (), judge
        space.once(self._open)

    def score(self, answers: Answers) -> list[float]:
        """Ask once for all processes; raises JudgeError when the judge gave up, or abstains from everything."""
        found: list[float] = self._once(lambda: self._ask(answers))
        return found

    def _open(self) -> None:
        stage, stop = self._stage, Stop()
        if threading.current_thread() is threading.main_thread():
            stop.listen()
        rank = os.environ.get("RANK", "0")
        directory = Path(stage.run_dir).expanduser().absolute()
        store = Store(directory / (STORE if rank == "0" else f"judged-rank-{rank}.jsonl"))

        def open_source(source: FeedbackModel, by: str) -> Model:
            return open_model(
                source, store, (by,), stop=stop, device=stage.launch.device, batch_size=16,
                trust_code=stage.trust_code,
            )  # fmt: skip

        own, judge = own_model(stage), self._source
        principles = load_constitution(self._constitution, needs="comparison")
        self._baseline = open_source(own, "generator")
        model = self._baseline if judge.model == own.model else open_source(judge, "judge")
        self._judge = Judge(model, principles, Examples(), Quoter(model.control_tokens), stage.seed)
        self._asker = Asker(stage.name, store, stop)

    def _ask(self, answers: Answers) -> list[float]:
        texts = [read_text(completion).strip() for completion in answers.completions]
        asked = [place for place, text in enumerate(texts) if text]
        jobs = [Job(ask_answer(answers.prompts[place]), 0) for place in asked]
        about: list[dict[str, Any]] = [{} for _ in jobs]
        replies = self._asker.write(self._baseline, jobs, self._sampling, kind="baseline", by="generator", about=about)
        pairings = []
        for place, reply in zip(asked, replies, strict=True):
            shown = answers.prompts[place], texts[place], reply.text.strip()
            pairings.append(Pairing(*shown, "", pair_key(*shown)))
        labels = judge_all(self._asker, self._judge, pairings)
        if labels and all(label.p_first is None for label in labels):
            raise JudgeError(f"the judge abstains from all {len(labels)} answers: {labels[0].problem}")
        rewards = [log_odds(0.0)] * len(texts)
        for place, label in zip(asked, labels, strict=True):
            values = [log_odds(value) for value in label.orders if value is not None]
            if values and label.p_first is not None:
                rewards[place] = sum(values) / len(values)
        return rewards

    @staticmethod
    def takes(source: RewardSource) -> bool:
        return source.judge is not None

    @staticmethod
    def check(source: RewardSource, stage: Stage, key: str, coming: Collection[str]) -> None:
        """Nothing here: judges are checked with all that is asked for feedback (`preflight.feedback`)."""

    @staticmethod
    def describe(source: RewardSource, stage: Stage, key: str) -> str:
        assert source.judge is not None
        return f"judged by {describe_model(source.judge, stage)}"

    @staticmethod
    def fingerprint(source: RewardSource, stage: Stage) -> str:
        assert source.judge is not None and source.constitution is not None
        judge = find_model_dir(source.judge.model) if source.judge.model is not None else None
        principles = load_constitution(source.constitution, needs="comparison").fingerprint
        return principles + (fingerprint_weights(judge) if judge else "")


def log_odds(p: float) -> float:
    """Compute log(p / (1 - p)), bounded: one sure judgement must not drown all others."""
    p = min(max(p, _WORST), 1.0 - _WORST)
    return math.log(p / (1.0 - p))
