"""Whether the rewards of a ppo stage are there and may be used, before anything heavy is loaded.

Looks at files only; functions are imported where the caller asks for it.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from pathlib import Path

from alignkit.errors import ModelError, Problem, RewardError, RunError, UsageError
from alignkit.models.files import find_model_dir, inspect_model_dir
from alignkit.preflight.feedback import describe_model
from alignkit.recipe import Stage
from alignkit.recipe.schema import BUILTIN_REWARD, PpoOptions, RewardSource
from alignkit.rewards.function import load_function, require_trust


def list_sources(stage: Stage) -> Iterator[tuple[str, RewardSource]]:
    """Yield (reward or gold, source) of a stage; nothing for methods without a reward."""
    if isinstance(stage.options, PpoOptions):
        yield from (("reward", source) for source in stage.options.reward)
        yield from (("gold", source) for source in stage.options.gold or ())


def require_rewards(stage: Stage, *, coming: Collection[str] = ()) -> None:
    """Raise what would stop a stage because of its rewards, all problems at once; `coming` are stages before it.

    A stage of this recipe that is not trained, a directory that is no reward model, pickles, code without --trust-code.
    Judges are the business of `feedback`.
    """
    problems: list[Problem] = []
    for key, source in list_sources(stage):
        where = stage.where(f"{stage.name}.{key}")
        try:
            if source.function is not None:
                require_trust(stage, source.function, where=where)
            elif source.model is None or stage.reward_stages.get(source.model) in coming:
                continue
            elif source.model != BUILTIN_REWARD:
                _require_model(stage, key, str(source.model), where)
        except UsageError as error:
            problems += error.problems
    if problems:
        raise RewardError(problems)


def describe_reward(stage: Stage, key: str, source: RewardSource) -> str:
    """Return what a source of a reward is, in words; imports functions where code is allowed.

    Raises RewardError, RunError or ModelError for what would stop the stage; a stage that is not trained yet would not.
    """
    weight = "" if source.weight == 1 else f", times {source.weight:g}"
    if source.function is not None:
        load_function(stage, source.function, key=key)
        return f"function {source.function}{weight}"
    if source.judge is not None:
        return f"judged by {describe_model(source.judge, stage)}{weight}"
    assert source.model is not None
    if source.model == BUILTIN_REWARD:
        return f"the toy world's true reward{weight}"
    name = stage.reward_stages.get(source.model)
    if name is not None and not Path(source.model).is_dir():
        return f"{name}, not trained yet{weight}"
    _require_model(stage, key, source.model, stage.where(f"{stage.name}.{key}"))
    return f"{name or source.model}{weight}"


def _require_model(stage: Stage, key: str, source: str, where: str) -> None:
    name = stage.reward_stages.get(source)
    if name is not None and not Path(source).is_dir():
        raise RunError(
            f"{stage.name}.{key} is {name}, which has not been trained to its end; train --stage {name} of "
            f"{shlex.quote(stage.recipe_path)} first, or name another reward",
            where=where,
        )
    try:
        directory = find_model_dir(source)
        files = inspect_model_dir(directory, trust_code=stage.trust_code) if directory else None
    except ModelError as error:
        raise ModelError([Problem(f"{stage.name}.{key}: {problem}", where) for problem in error.problems]) from error
    if files is not None and not files.reward:
        raise ModelError(
            f"{stage.name}.{key} is {source}, a language model; a reward is an rm stage or a classifier", where=where
        )
