"""The kinds of rewards: a file each, named as its key in a recipe, with its class as `KIND`."""

import importlib
from collections.abc import Collection
from functools import cache
from pathlib import Path

from alignkit.data import true_reward
from alignkit.errors import Problem, RewardError, UsageError
from alignkit.feedback.constitution import load_constitution
from alignkit.feedback.prompts import read_text
from alignkit.models.files import find_model_dir, inspect_model_dir, is_builtin
from alignkit.recipe import Stage
from alignkit.recipe.schema import BUILTIN_REWARD, REWARD_KINDS, EvaluateOptions, RewardSource
from alignkit.rewards import Answers, Reward, Workspace, stage_space
from alignkit.rewards.kinds.function import is_function
from alignkit.rewards.kinds.judge import Comparer, ModelComparer, RewardComparer


class BuiltinReward:
    """The sentiment of the toy world, in [-1, 1]: the mean worth of an answer's words."""

    name = "true_reward"

    def __init__(self, source: RewardSource, space: Workspace) -> None:
        if source.model != BUILTIN_REWARD:
            what = f"{source.model} is no builtin reward; the only one is {BUILTIN_REWARD}"
            raise RewardError(what, where=space.where)

    def score(self, answers: Answers) -> list[float]:
        return [true_reward(read_text(completion)) for completion in answers.completions]

    @staticmethod
    def check(source: RewardSource, stage: Stage, key: str, coming: Collection[str] | None = None) -> str:
        BuiltinReward(source, stage_space(stage, key))
        return "the toy world's true reward"

    @staticmethod
    def fingerprint(source: RewardSource, stage: Stage) -> None:
        return None


@cache
def _load(key: str) -> type[Reward]:
    kind: type[Reward] = importlib.import_module(f"{__name__}.{key}").KIND
    return kind


def kind_of(source: RewardSource) -> type[Reward]:
    if (source.model or "").startswith("builtin:"):
        return BuiltinReward
    return _load(next(key for key in REWARD_KINDS if getattr(source, key) is not None))


def open_reward(source: RewardSource | str, space: Workspace) -> Reward:
    """Make ready what scores; a name is builtin:true-reward, pkg.module:function, a run, a directory or a hub id."""
    if isinstance(source, str):
        source = RewardSource(function=source) if is_function(source) else RewardSource(model=source)
    return kind_of(source)(source, space)


def check_rewards(stage: Stage, *, coming: Collection[str] = ()) -> None:
    """Raise what would stop a stage because of its rewards, all problems at once; `coming` are stages before it."""
    problems: list[Problem] = []
    for key, source in stage.rewards:
        try:
            kind_of(source).check(source, stage, key, coming)
        except UsageError as error:
            problems += error.problems
    if problems:
        raise RewardError(problems)


def describe_reward(stage: Stage, key: str, source: RewardSource) -> str:
    """Say in words what a source is; raises what would stop the stage, but not for a stage that is not trained yet."""
    weight = "" if source.weight == 1 else f", times {source.weight:g}"
    return kind_of(source).check(source, stage, key) + weight


def fingerprint_rewards(stage: Stage) -> dict[str, list[str | None]]:
    """Hash models and the files of functions that a stage is scored by, for its fingerprint."""
    found = [kind_of(source).fingerprint(source, stage) for key, source in stage.rewards if key == "reward"]
    return {"reward_weights": found} if found else {}


def make_comparer(
    options: EvaluateOptions, space: Workspace, *, reward: Reward | None, seed: int, store: Path | None
) -> Comparer:
    """Make the judge that the options name, else of `reward`; the verdicts of a language model are kept in `store`."""
    check_judge(options)
    if options.judge is not None and options.constitution is not None:
        return ModelComparer(options.judge, options.constitution, space, seed=seed, store=store)
    if options.judge is not None:
        reward = open_reward(str(options.judge.model), space)
    if reward is None:
        what = "a reward model, a function or builtin:true-reward (--judge), or a language model with principles"
        raise UsageError(f"win_rate needs a judge: {what} (--judge and --constitution)")
    return RewardComparer(reward)


def check_judge(options: EvaluateOptions) -> None:
    """Look at the files of judge and constitution; raises UsageError or ModelError for a pair that cannot judge."""
    constitution, name = options.constitution, options.judge.model if options.judge else None
    if constitution is not None:
        load_constitution(constitution, needs="comparison")
    directory = None if name is None or is_function(name) or is_builtin(name) else find_model_dir(name)
    if directory is None:  # on the hub: what it is shows when it is loaded
        return
    reward, what = inspect_model_dir(directory, trust_code=True).reward, ""
    if reward and constitution is not None:
        what = "reward model, which goes by no principles; leave constitution out, or name a language model"
    elif not reward and constitution is None:
        what = "language model, which judges by principles; add constitution (--constitution builtin:helpfulness, or "
        what += "a file), or name a reward model"
    if what:
        raise UsageError(f"the judge {name} is a {what}")
