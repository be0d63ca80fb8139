"""What scores an answer in an evaluation: the toy world's true reward, a reward model, or a function.

Single rewards only, as they are: sums, clipping and penalties are how a ppo stage is trained, not how it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from alignkit.data import Text, true_reward
from alignkit.errors import NonFiniteError, RewardError
from alignkit.evaluate.policy import Shelf, collect_memory
from alignkit.models.causal import fingerprint_causal
from alignkit.models.chat import Chat
from alignkit.models.classifier import (
    Classifier,
    encode_foreign,
    encode_own,
    load_classifier,
    name_source,
    read_norm,
    scorer,
)
from alignkit.recipe.schema import BUILTIN_REWARD
from alignkit.rewards.function import RewardFunction, import_function

_FUNCTION_SECONDS = 60.0


class Reward(Protocol):
    """Something that gives an answer a number: the higher the better."""

    name: str

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], ended: Sequence[bool] | None = None
    ) -> list[float]:
        """Return one finite number per answer; `ended` is False for one that was cut off."""


def make_reward(source: str, shelf: Shelf, *, folder: Path) -> Reward:
    """Return a reward by its name: builtin:true-reward, pkg.module:function, a run, a directory or a hub id.

    A function is looked up on sys.path and in `folder`, and needs --trust-code. Raises RewardError or ModelError.
    """
    if source == BUILTIN_REWARD:
        return TrueReward()
    if is_function(source):
        if not shelf.trust_code:
            raise RewardError(
                f"the reward function {source} is code; read it, and give --trust-code on the command line"
            )
        return FunctionReward(import_function(source, folder=folder, seconds=_FUNCTION_SECONDS, where=None))
    if source.startswith("builtin:"):
        raise RewardError(f"{source} is no builtin reward; the only one is {BUILTIN_REWARD}")
    return ModelReward(source, shelf)


def is_function(source: str) -> bool:
    """Tell `pkg.module:name` from a path or a hub id."""
    module, colon, name = source.partition(":")
    parts = module.split(".")
    return bool(colon) and module != "builtin" and name.isidentifier() and all(part.isidentifier() for part in parts)


class TrueReward:
    """The toy world's own sentiment, in [-1, 1]."""

    name = "true_reward"

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], ended: Sequence[bool] | None = None
    ) -> list[float]:
        """Return the mean worth of the words of each answer."""
        return [true_reward(read_text(completion)) for completion in completions]


class FunctionReward:
    """A Python function of prompts and answers, under a time limit; it is not given columns."""

    def __init__(self, function: RewardFunction) -> None:
        self._function = function
        self.name = function.path.rpartition(":")[2]

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], ended: Sequence[bool] | None = None
    ) -> list[float]:
        """Return what the function says of all answers at once."""
        return self._function(prompts, completions, {}) if prompts else []


class ModelReward:
    """A sequence classifier with the gain and bias its rm stage measured, cached by content."""

    def __init__(self, source: str, shelf: Shelf) -> None:
        """Take down where the weights are; raises ModelError when nothing is there."""
        self._source, self._shelf = source, shelf
        self.name = name_source(source)
        self._norm = read_norm(source)
        self.weights = fingerprint_causal(source)
        self._classifier: Classifier | None = None

    def release(self) -> None:
        """Let go of the weights."""
        self._classifier = None
        collect_memory()

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], ended: Sequence[bool] | None = None
    ) -> list[float]:
        """Return gain * r + bias of each answer; raises RewardError for one that is too long, or has no score."""
        scores = self.score_fitting(prompts, completions, ended)
        if None in scores:
            raise RewardError(
                f"the reward model {self.name} cannot read answer {scores.index(None)}, which is too long with its "
                "prompt; lower max_new_tokens, or leave out long rows"
            )
        return [score for score in scores if score is not None]

    def score_fitting(
        self, prompts: Sequence[Text], completions: Sequence[Text], ended: Sequence[bool] | None = None
    ) -> list[float | None]:
        """Return the same, None for an answer that is too long for the model with its prompt."""
        gain, bias = self._norm
        questions = list(zip(prompts, completions, ended or [True] * len(prompts), strict=True))
        common = {"kind": "reward", "weights": self.weights}
        scores = self._shelf.cache.ask(common, questions, lambda places: self._score([questions[p] for p in places]))
        return [None if score is None else gain * score + bias for score in scores]

    def _score(self, questions: Sequence[tuple[Text, Text, bool]]) -> list[float | None]:
        self._shelf.take(self)
        if self._classifier is None:
            self._classifier = load_classifier(
                self._source, device=self._shelf.device, trust_code=self._shelf.trust_code
            )
        prompts, completions, ended = (list(column) for column in zip(*questions, strict=True))
        if self._classifier.is_own:
            ids = encode_own(Chat(self._classifier.tokenizer), prompts, completions, ended, name=self.name)
        else:
            ids = encode_foreign(self._classifier.tokenizer, prompts, completions, name=self.name)
        limit = self._classifier.positions
        fitting = [place for place, tokens in enumerate(ids) if limit is None or len(tokens) <= limit]
        found: list[float] = scorer(self._classifier)([ids[place] for place in fitting]).tolist()
        if not all(map(math.isfinite, found)):
            raise NonFiniteError(f"the reward model {self.name} gives an answer a score that is not finite")
        scores: list[float | None] = [None] * len(ids)
        for place, score in zip(fitting, found, strict=True):
            scores[place] = score
        return scores


def read_text(content: Any) -> str:
    """Return the text of an answer, which may be text or messages."""
    return content if isinstance(content, str) else "\n".join(message["content"] for message in content)
