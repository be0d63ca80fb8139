"""The table of the kinds of rewards, and what a stage wants of all of its rewards."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from alignkit.data import true_reward
from alignkit.errors import Problem, RewardError, UsageError
from alignkit.feedback.cache import Store
from alignkit.feedback.prompts import read_text
from alignkit.recipe import Stage
from alignkit.recipe.schema import BUILTIN_REWARD, RewardSource
from alignkit.rewards.base import Answers, Reward, Workspace, stage_space
from alignkit.rewards.classifier import ClassifierReward
from alignkit.rewards.function import FunctionReward, is_function
from alignkit.rewards.judge import JudgeReward
from alignkit.rewards.verify import VerifyReward


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
    def takes(source: RewardSource) -> bool:
        return (source.model or "").startswith("builtin:")

    @staticmethod
    def check(source: RewardSource, stage: Stage, key: str, coming: Collection[str]) -> None:
        BuiltinReward(source, stage_space(stage, key))

    @staticmethod
    def describe(source: RewardSource, stage: Stage, key: str) -> str:
        return "the toy world's true reward"

    @staticmethod
    def fingerprint(source: RewardSource, stage: Stage) -> None:
        return None


# A new kind is a class here: the first that takes a source has it.
KINDS: tuple[type[Reward], ...] = (FunctionReward, JudgeReward, VerifyReward, BuiltinReward, ClassifierReward)


def kind_of(source: RewardSource) -> type[Reward]:
    return next(kind for kind in KINDS if kind.takes(source))


def open_reward(source: RewardSource | str, space: Workspace) -> Reward:
    """Make ready what scores; a name is builtin:true-reward, pkg.module:function, a run, a directory or a hub id."""
    if isinstance(source, str):
        source = RewardSource(function=source) if is_function(source) else RewardSource(model=source)
    return kind_of(source)(source, space)


def open_rewards(stage: Stage, sources: Sequence[RewardSource], *, key: str = "reward") -> list[tuple[Reward, float]]:
    """Open the rewards of a stage outside training, each with its weight in their sum."""
    space = replace(stage_space(stage, key), cache=Store())
    return [(open_reward(source, space), source.weight) for source in sources]


def check_rewards(stage: Stage, *, coming: Collection[str] = ()) -> None:
    """Raise what would stop a stage because of its rewards, all problems at once; `coming` are stages before it.

    A stage of this recipe that is not trained, a directory that is no reward model, pickles, code without --trust-code.
    """
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
    return kind_of(source).describe(source, stage, key) + weight


def fingerprint_rewards(stage: Stage) -> dict[str, list[str | None]]:
    """Hash models and the files of functions that a stage is scored by, for its fingerprint."""
    found = [kind_of(source).fingerprint(source, stage) for key, source in stage.rewards if key == "reward"]
    return {"reward_weights": found} if found else {}
