"""A sequence classifier as a reward: an rm stage's, or any other with one or two labels."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.data import Text
from alignkit.errors import ModelError, NonFiniteError, Problem, RewardError, RunError
from alignkit.models.files import REWARD_NORM, find_model_dir, fingerprint_weights, inspect_model_dir
from alignkit.recipe import Stage
from alignkit.recipe.schema import RewardSource
from alignkit.rewards import Answers, Workspace, collect_memory, name_source

if TYPE_CHECKING:
    from alignkit.models.frozen import Classifier, ScoreIds

Encode = Callable[[Any], list[list[int]]]


class ClassifierReward:
    """A classifier's logit (of two labels their log-odds), with the gain and bias that its rm stage measured."""

    def __init__(self, source: RewardSource, space: Workspace) -> None:
        """Find the weights; raises ModelError when nothing is there."""
        from alignkit.models.frozen import read_norm

        self._source, self._space = str(source.model), space
        stages = space.stage.reward_stages if space.stage else {}
        self.name = stages.get(self._source) or name_source(self._source)
        self._norm = read_norm(self._source)
        self._classifier: Classifier | None = None
        self._score_ids: ScoreIds | None = None
        self._weights: str | None = None  # their hash, once it is asked for
        self.encode: Encode = self._encode

    def hold(self, classifier: Classifier | None = None, score_ids: ScoreIds | None = None) -> Classifier:
        """Load the weights, or take a classifier whose scores the caller computes (an adapter on a policy's base)."""
        from alignkit.models import frozen, kernels

        if classifier is not None:
            self._classifier, self._score_ids = classifier, score_ids
        elif self._classifier is None:
            space = self._space
            self._classifier = frozen.load_classifier(self._source, device=space.device, trust_code=space.trust_code)
            model = self._classifier.model
            kernels.leave_out_unread(model)
            self._score_ids = partial(frozen.score_ids, model, pad_id=int(model.config.pad_token_id))
        return self._classifier

    def release(self) -> None:
        self._classifier = self._score_ids = None
        collect_memory()

    def score(self, answers: Answers) -> list[float]:
        """Score answers through the cache, else by all processes together; raises RewardError for one too long."""
        gain, bias = self._norm
        if self._space.cache is None:
            limit, sequences = self.hold().positions, self.encode(answers)
            long = next((at for at, ids in enumerate(sequences) if limit is not None and len(ids) > limit), None)
            if long is None:
                return [gain * score + bias for score in self._space.split(sequences, self._score_sequences)]
            what = f"reads {limit} tokens, and answer {long} with its prompt has {len(sequences[long])}"
        else:
            scores = self.score_fitting(answers)
            if None not in scores:
                return [score for score in scores if score is not None]
            what = f"cannot read answer {scores.index(None)}, which is too long with its prompt"
        advice = "lower max_new_tokens, leave out long prompts, or take another reward"
        raise RewardError(f"the reward model {self.name} {what}; {advice}")

    def score_fitting(self, answers: Answers) -> list[float | None]:
        """Score answers through the cache; None for one that is too long for the model with its prompt."""
        from alignkit.models.frozen import fingerprint_causal

        def score(asked: Sequence[tuple[Text, Text, bool]]) -> list[float | None]:
            self._space.take(self)
            limit = self.hold().positions
            prompts, completions, ended = (list(column) for column in zip(*asked, strict=True))
            sequences = self._encode(Answers(prompts, completions, ended))
            fits = [limit is None or len(ids) <= limit for ids in sequences]
            found = self._score_sequences(list(compress(sequences, fits)))
            if not all(map(math.isfinite, found)):
                raise NonFiniteError(f"the reward model {self.name} gives an answer a score that is not finite")
            waiting = iter(found)
            return [next(waiting) if fit else None for fit in fits]

        self._weights = self._weights or fingerprint_causal(self._source)
        ended = answers.ended or [True] * len(answers.prompts)
        questions = list(zip(answers.prompts, answers.completions, ended, strict=True))
        assert self._space.cache is not None
        scores = self._space.cache.ask({"kind": "reward", "weights": self._weights}, questions, score)
        gain, bias = self._norm
        return [None if score is None else gain * score + bias for score in scores]

    def _score_sequences(self, sequences: Sequence[list[int]]) -> list[float]:
        assert self._score_ids is not None
        found: list[float] = self._score_ids(list(sequences)).float().tolist()
        return found

    def _encode(self, answers: Answers) -> list[list[int]]:
        """Write prompts and answers as its rm stage did, else as its own tokenizer and template do."""
        from alignkit.models.chat import Chat
        from alignkit.models.frozen import encode_foreign, encode_own

        classifier = self.hold()
        if not classifier.is_own:
            return encode_foreign(classifier.tokenizer, answers.prompts, answers.completions, name=self.name)
        ended = answers.ended or [True] * len(answers.prompts)
        return encode_own(Chat(classifier.tokenizer), answers.prompts, answers.completions, ended, name=self.name)

    @staticmethod
    def check(source: RewardSource, stage: Stage, key: str, coming: Collection[str] | None = None) -> str:
        path, where = str(source.model), stage.where(f"{stage.name}.{key}")
        name, is_there = stage.reward_stages.get(path), Path(path).is_dir()
        if name is not None and (name in coming if coming is not None else not is_there):
            return f"{name}, not trained yet"
        if name is not None and not is_there:
            what = f"{stage.name}.{key} is {name}, which has not been trained to its end; train --stage {name} of"
            raise RunError(f"{what} {shlex.quote(stage.recipe_path)} first, or name another reward", where=where)
        try:
            directory = find_model_dir(path)
            files = inspect_model_dir(directory, trust_code=stage.trust_code) if directory else None
        except ModelError as error:
            problems = [Problem(f"{stage.name}.{key}: {problem}", where) for problem in error.problems]
            raise ModelError(problems) from error
        if files is not None and (files.head or not files.reward):
            kind = "a classifier of labelled texts" if files.head else "a language model"
            what = f"{stage.name}.{key} is {path}, {kind}; a reward is an rm stage or a classifier of answers"
            raise ModelError(what, where=where)
        return name or path

    @staticmethod
    def fingerprint(source: RewardSource, stage: Stage) -> str | None:
        directory = find_model_dir(str(source.model))
        if directory is None:
            return None
        norm = directory / REWARD_NORM
        extra = hashlib.blake2b(norm.read_bytes(), digest_size=16).hexdigest() if norm.is_file() else ""
        return fingerprint_weights(directory) + extra


KIND = ClassifierReward
