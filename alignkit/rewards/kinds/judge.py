"""Judges: a language model with principles as the reward of PPO or for win rates, and a reward that compares."""

import math
import os
import threading
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from alignkit.data import Text
from alignkit.errors import JudgeError, RewardError, UsageError
from alignkit.feedback.cache import Asker, Store
from alignkit.feedback.constitution import Examples, load_constitution
from alignkit.feedback.judge import Judge, Label, Pairing, describe_labels, find_faults, judge_all, pair_key
from alignkit.feedback.prompts import Quoter, ask_answer, read_text
from alignkit.feedback.server import find_key, require_client
from alignkit.feedback.stage import describe_model, open_model, own_model
from alignkit.feedback.writer import Job, Model, Sampling
from alignkit.models.files import find_model_dir, fingerprint_weights
from alignkit.recipe import Stage
from alignkit.recipe.methods import PpoOptions
from alignkit.recipe.schema import FeedbackModel, RewardSource
from alignkit.rewards import Answers, Reward, Workspace, collect_memory, name_source
from alignkit.runs.signals import Stop, stop_between_answers

STORE = "judged.jsonl"
_WORST = 1e-4  # a probability from which the log-odds go no further: 9.2 nats
_TIE = (0.5,)
Orders = tuple[float | None, ...]  # P(first is better): as it was asked, in one order or in both; None: abstained


class Comparer(Protocol):
    """Says which of two answers to a prompt is better."""

    name: str
    settings: dict[str, Any]  # what else decides what it says, for eval.json
    report: dict[str, Any]  # on the judge itself after `compare`: order consistency, bias, principles, spending

    def compare(self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]) -> list[Orders]:
        """Give P(first is better) of each pair, 0.5 for a tie, None for an abstention; of both orders where read."""


class RewardComparer:
    """The higher reward wins; equal rewards tie. An answer that was cut off is scored as if it had ended there."""

    def __init__(self, reward: Reward) -> None:
        self._reward, self.name = reward, reward.name
        self.settings, self.report = dict[str, Any](), dict[str, Any]()

    def compare(self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]) -> list[Orders]:
        scores = self._reward.score(Answers([*prompts, *prompts], [*firsts, *seconds]))
        ours, theirs = scores[: len(firsts)], scores[len(firsts) :]
        return [_TIE if a == b else (float(a > b),) for a, b in zip(ours, theirs, strict=True)]


class ModelComparer:
    """A language model that goes by a principle drawn for each pair, in both orders; nothing is asked twice."""

    def __init__(
        self, source: FeedbackModel, constitution: str | Sequence[str], space: Workspace, *, seed: int,
        store: Path | None,
    ) -> None:  # fmt: skip
        """Read the constitution; a server needs a `store`, where verdicts are kept.
        Raises RecipeError for a constitution, UsageError or EnvironmentProblem for a server that cannot be used."""
        self._principles = load_constitution(constitution, needs="comparison")
        self._source, self._space, self._seed, self._path = source, space, seed, store
        self._model: Model | None = None
        self.report: dict[str, Any] = {}
        self.name = name_source(str(source.model))
        if source.url is not None:
            require_client()
            find_key(source)
            if store is None:
                what = "a judge behind a url is asked once: give --out FILE, beside which its verdicts are kept"
                raise UsageError(what)
            self.name = f"{source.name} at {urlsplit(source.url).netloc}"
        files = [constitution] if isinstance(constitution, str) else constitution
        self.settings = {"constitution": ", ".join(Path(file).name for file in files)}

    def release(self) -> None:
        self._model = None
        collect_memory()

    def compare(self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]) -> list[Orders]:
        """Ask about each pair in both orders; unasked, equal answers tie and an empty one loses. Raises JudgeError."""
        outcomes: list[Orders] = []
        pairings: dict[int, Pairing] = {}
        for place, (prompt, first, second) in enumerate(zip(prompts, firsts, seconds, strict=True)):
            one, other = read_text(first).strip(), read_text(second).strip()
            outcomes.append(_TIE if one == other else (float(bool(one)),))
            if one != other and one and other:  # whichever run is measured, it is by the same principle
                key = pair_key(prompt, *sorted((first, second), key=read_text))
                pairings[place] = Pairing(prompt, first, second, f"prompt {place}", key)
        labels = self._ask([*pairings.values()]) if pairings else []
        if labels and all(label.p_first is None for label in labels):
            what = f"abstains from all {len(labels)} comparisons: {labels[0].problem}"
            raise JudgeError(f"the judge {self.name} {what}")
        spending = self._model.spending if self._model is not None else None
        self.report = {**describe_labels(labels), "spent": spending.to_dict() if spending is not None else None}
        for fault in find_faults(self.report):
            self._space.warn(f"{self.name}: {fault}")
        for place, label in zip(pairings, labels, strict=True):
            outcomes[place] = label.orders
        return outcomes

    def _ask(self, pairings: Sequence[Pairing]) -> list[Label]:
        space = self._space
        with stop_between_answers() as stop, closing(Store(self._path, alone=True)) as store:
            space.take(self)
            self._model = open_model(
                self._source, store, (self.name,), stop=stop, device=space.device, batch_size=space.batch_size,
                trust_code=space.trust_code,
            )  # fmt: skip
            judge = Judge(self._model, self._principles, Examples(), Quoter(self._model.control_tokens), self._seed)
            return judge_all(Asker("win_rate", store, stop), judge, pairings, by=self.name)


class JudgeReward:
    """Log-odds of a judge preferring an answer to the greedy answer of the model that PPO starts from.
    The question is that of labels, with both orders averaged. An answer that is empty (unasked), too long for the judge
    or abstained from gets the lowest reward there is: it must not pay to confuse the judge. Verdicts are kept."""

    name = "judge"

    def __init__(self, source: RewardSource, space: Workspace) -> None:
        """Open the judge, in the one process that asks."""
        stage, judge = space.stage, source.judge
        assert judge is not None
        if stage is None:
            raise RewardError("a judge compares; name it as the judge of a win rate", where=space.where)
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
        settings: dict[str, Any] = {"device": stage.launch.device, "batch_size": 16, "trust_code": stage.trust_code}
        own, judge = own_model(stage), self._source
        principles = load_constitution(self._constitution, needs="comparison")
        self._baseline = model = open_model(own, store, ("generator",), stop=stop, **settings)
        if judge.model != own.model:
            model = open_model(judge, store, ("judge",), stop=stop, **settings)
        self._judge = Judge(model, principles, Examples(), Quoter(model.control_tokens), stage.seed)
        self._asker = Asker(stage.name, store, stop)

    def _ask(self, answers: Answers) -> list[float]:
        texts = [read_text(completion).strip() for completion in answers.completions]
        asked = [place for place, text in enumerate(texts) if text]
        jobs = [Job(ask_answer(answers.prompts[place]), 0) for place in asked]
        about: list[dict[str, Any]] = [{} for _ in jobs]
        replies = self._asker.write(self._baseline, jobs, self._sampling, kind="baseline", by="generator", about=about)
        shown = [(answers.prompts[at], texts[at], reply.text.strip()) for at, reply in zip(asked, replies, strict=True)]
        labels = judge_all(self._asker, self._judge, [Pairing(*each, "", pair_key(*each)) for each in shown])
        if labels and all(label.p_first is None for label in labels):
            raise JudgeError(f"the judge abstains from all {len(labels)} answers: {labels[0].problem}")
        rewards = [log_odds(0.0)] * len(texts)
        for place, label in zip(asked, labels, strict=True):
            values = [log_odds(value) for value in label.orders if value is not None]
            if values and label.p_first is not None:
                rewards[place] = sum(values) / len(values)
        return rewards

    @staticmethod
    def check(source: RewardSource, stage: Stage, key: str, coming: Collection[str] | None = None) -> str:
        assert source.judge is not None  # checked with all that is asked for feedback
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


KIND = JudgeReward
