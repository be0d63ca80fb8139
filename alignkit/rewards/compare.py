"""Judges for win rates: a reward, or a language model with principles."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from alignkit.data import Text
from alignkit.errors import JudgeError, UsageError
from alignkit.feedback.cache import Asker, Store
from alignkit.feedback.constitution import Examples, load_constitution
from alignkit.feedback.judge import Judge, Label, Pairing, describe_labels, find_faults, judge_all, pair_key
from alignkit.feedback.prompts import Quoter, read_text
from alignkit.feedback.server import find_key, require_client
from alignkit.feedback.stage import open_model
from alignkit.feedback.writer import Model
from alignkit.models.files import find_model_dir, inspect_model_dir, is_builtin
from alignkit.recipe.schema import EvaluateOptions, FeedbackModel
from alignkit.rewards.base import Answers, Reward, Workspace, collect_memory, name_source
from alignkit.rewards.function import is_function
from alignkit.rewards.kinds import open_reward
from alignkit.runs.stop import stop_between_answers

_TIE = (0.5,)
Orders = tuple[float | None, ...]  # P(first is better): as it was asked, in one order or in both; None: abstained


class Comparer(Protocol):
    """Says which of two answers to a prompt is better."""

    name: str
    settings: dict[str, Any]  # what else decides what it says, for eval.json
    report: dict[str, Any]  # on the judge itself after `compare`: order consistency, bias, principles, spending

    def compare(self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]) -> list[Orders]:
        """Give P(first is better) of each pair, in [0, 1]; 0.5 is a tie, None an abstention.

        One number where the order was not read; else two: with the first answer shown first, and shown second.
        """


class RewardComparer:
    """The higher reward wins; equal rewards tie. An answer that was cut off is scored as if it had ended there."""

    def __init__(self, reward: Reward) -> None:
        self._reward, self.name = reward, reward.name
        self.settings: dict[str, Any] = {}
        self.report: dict[str, Any] = {}

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
        """Read the constitution; no weights are loaded and nothing is asked yet.

        `store` is where verdicts are kept; without one they last as long as the object, which a server is not asked
        for. Raises RecipeError for a constitution, UsageError or EnvironmentProblem for a server that cannot be used.
        """
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
        """Ask about each pair; two answers that are the same tie, and an empty one loses, without a question.

        Raises JudgeError when the judge gave up, the budget is spent, or it abstains from everything; Stopped after a
        signal; RunError when another evaluation has the verdicts open. What was answered is kept.
        """
        outcomes: list[Orders | None] = []
        pairings = []
        for place, (prompt, first, second) in enumerate(zip(prompts, firsts, seconds, strict=True)):
            one, other = read_text(first).strip(), read_text(second).strip()
            if one == other or not (one and other):
                outcomes.append(_TIE if one == other else (float(bool(one)),))
                continue
            # Whichever run is measured against the other, it is by the same principle.
            key = pair_key(prompt, *sorted((first, second), key=read_text))
            pairings.append(Pairing(prompt, first, second, f"prompt {place}", key))
            outcomes.append(None)
        labels = self._ask(pairings) if pairings else []
        if labels and all(label.p_first is None for label in labels):
            reason = labels[0].problem
            raise JudgeError(f"the judge {self.name} abstains from all {len(labels)} comparisons: {reason}")
        spending = self._model.spending if self._model is not None else None
        self.report = {**describe_labels(labels), "spent": spending.to_dict() if spending is not None else None}
        for fault in find_faults(self.report):
            self._space.warn(f"{self.name}: {fault}")
        answered = iter(labels)
        return [next(answered).orders if outcome is None else outcome for outcome in outcomes]

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


def make_comparer(
    options: EvaluateOptions, space: Workspace, *, reward: Reward | None, seed: int, store: Path | None
) -> Comparer:
    """Make the judge that the options name, else `reward` as one; no weights are loaded yet.

    `store` is where a language model's verdicts are kept. Raises UsageError without a judge and for what cannot be one.
    """
    check_judge(options)
    if options.judge is not None and options.constitution is not None:
        return ModelComparer(options.judge, options.constitution, space, seed=seed, store=store)
    if options.judge is not None:
        return RewardComparer(open_reward(str(options.judge.model), space))
    if reward is None:
        raise UsageError(
            "win_rate needs a judge: a reward model, a function or builtin:true-reward (--judge), or a language model "
            "with principles (--judge and --constitution)"
        )
    return RewardComparer(reward)


def check_judge(options: EvaluateOptions) -> None:
    """Look at the files of the judge and its constitution.

    Raises UsageError for a reward model with a constitution, a language model without one, and a constitution that
    cannot be used; ModelError for a judge that is not there.
    """
    constitution, name = options.constitution, options.judge.model if options.judge else None
    if constitution is not None:
        load_constitution(constitution, needs="comparison")
    directory = None if name is None or is_function(name) or is_builtin(name) else find_model_dir(name)
    if directory is None:  # on the hub: what it is shows when it is loaded
        return
    reward = inspect_model_dir(directory, trust_code=True).reward
    if reward and constitution is not None:
        what = "a reward model, which goes by no principles; leave constitution out, or name a language model"
        raise UsageError(f"the judge {name} is {what}")
    if not reward and constitution is None:
        what = "a language model, which judges by principles; add constitution (--constitution builtin:helpfulness, or "
        raise UsageError(f"the judge {name} is {what}a file), or name a reward model")
