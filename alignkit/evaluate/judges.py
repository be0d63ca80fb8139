"""Who says which of two answers is better: the seam between win rates and whatever can compare.

A reward is a judge that does not see the order; a language model (`model_judge`) does, and is asked both ways round.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from alignkit.data import Text
from alignkit.errors import UsageError
from alignkit.evaluate.policy import Shelf
from alignkit.evaluate.rewards import Reward, is_function, make_reward
from alignkit.models.files import find_model_dir, inspect_model_dir, is_builtin
from alignkit.recipe.schema import EvaluateOptions


class Judge(Protocol):
    """Compares two answers to one prompt."""

    name: str
    settings: dict[str, Any]  # what else decides its verdicts, for eval.json

    def compare(
        self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]
    ) -> list[tuple[float | None, ...]]:
        """Return P(first is better) of each pair, in [0, 1]; 0.5 is a tie, None an abstention.

        One number where the order was not read; else two: with the first answer shown first, and shown second.
        """

    def describe(self) -> dict[str, Any]:
        """Return what there is to say of the judge itself after `compare`."""


class RewardJudge:
    """The higher reward wins; equal rewards tie. An answer that was cut off is scored as if it had ended there."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.name = reward.name
        self.settings: dict[str, Any] = {}

    def compare(
        self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]
    ) -> list[tuple[float | None, ...]]:
        """Return 1, 0 or 0.5."""
        scores = self._reward.score([*prompts, *prompts], [*firsts, *seconds])
        ours, theirs = scores[: len(firsts)], scores[len(firsts) :]
        return [(0.5 if a == b else float(a > b),) for a, b in zip(ours, theirs, strict=True)]

    def describe(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


def make_judge(
    options: EvaluateOptions, shelf: Shelf, *, reward: Reward | None, folder: Path, seed: int, store: Path | None
) -> Judge:
    """Return the judge that the options name, else `reward` as one; no weights are loaded yet.

    `folder` is where functions are looked up, `store` where a language model's verdicts are kept. Raises UsageError
    where there is none, and what cannot be one.
    """
    check_judge(options)
    if options.judge is None:
        if reward is None:
            raise UsageError(
                "win_rate needs a judge: a reward model, a function or builtin:true-reward (--judge), or a language "
                "model with principles (--judge and --constitution)"
            )
        return RewardJudge(reward)
    if options.constitution is None:
        return RewardJudge(make_reward(str(options.judge.model), shelf, folder=folder))
    from alignkit.evaluate.model_judge import ModelJudge

    return ModelJudge(options.judge, options.constitution, shelf, seed=seed, store=store)


def check_judge(options: EvaluateOptions) -> None:
    """Look at the files of the judge and its constitution.

    Raises UsageError for a reward model with a constitution, a language model without one, and a constitution that
    cannot be used; ModelError for a judge that is not there.
    """
    judge, constitution = options.judge, options.constitution
    if constitution is not None:
        from alignkit.feedback.constitution import load_constitution

        load_constitution(constitution, needs="comparison")
    name = judge.model if judge is not None else None
    if name is None or is_function(name) or is_builtin(name):
        return
    directory = find_model_dir(name)
    if directory is None:  # on the hub: what it is shows when it is loaded
        return
    reward = inspect_model_dir(directory, trust_code=True).reward
    if reward and constitution is not None:
        raise UsageError(
            f"the judge {name} is a reward model, which goes by no principles; leave constitution out, or name a "
            "language model"
        )
    if not reward and constitution is None:
        raise UsageError(
            f"the judge {name} is a language model, which judges by principles; add constitution (--constitution "
            "builtin:helpfulness, or a file), or name a reward model"
        )
