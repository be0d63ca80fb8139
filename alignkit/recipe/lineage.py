"""What a stage takes from other stages of its recipe, as paths in their runs: weights, rewards, judges and rows.

It looks at names only; whether those runs are there is for others to find out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel

from alignkit.recipe.recipe import Recipe
from alignkit.recipe.schema import FEEDBACK, DataSource, FeedbackModel, PpoOptions, RewardSource, StageOptions

RUNS = "runs"
ROWS = "rows.jsonl"  # what a critique or label stage writes
_Options = TypeVar("_Options", bound=StageOptions)


@dataclass
class Pointed:
    """Options with every name of a stage replaced, and which path stands for which stage."""

    options: StageOptions
    rewards: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


def point(recipe: Recipe, options: StageOptions) -> Pointed:
    """Return the options with stages of the recipe as the directories and files they make."""
    pointed = Pointed(options)

    def point_model(model: FeedbackModel) -> FeedbackModel:
        if model.model is None:
            return model
        return model.model_copy(update={"model": find_model(recipe, model.model, pointed.sources)})

    def point_source(source: DataSource) -> DataSource:
        section = recipe.stages.get(source.path)
        if section is None or section.options.method not in FEEDBACK:
            return source
        path = f"{RUNS}/{recipe.name}/{source.path}/{ROWS}"
        pointed.sources[path] = source.path
        return source.model_copy(update={"path": path})

    def point_reward(reward: RewardSource) -> RewardSource:
        if reward.model is None:
            return reward
        return reward.model_copy(update={"model": find_model(recipe, reward.model, pointed.rewards)})

    options = _replace(options, FeedbackModel, point_model)
    options = _replace(options, DataSource, point_source)
    if isinstance(options, PpoOptions):
        options = _replace(options, RewardSource, point_reward)
    pointed.options = options
    return pointed


def find_model(recipe: Recipe, name: str, found: dict[str, str] | None = None) -> str:
    """Return the model directory of a stage or a run, anything else as it is; note in `found` what is a stage's."""
    if name not in recipe.stages:
        return find_weights(name)
    directory = f"{RUNS}/{recipe.name}/{name}/model"
    if found is not None:
        found[directory] = name
    return directory


def find_weights(path: str) -> str:
    """Return the model/ of a run directory; anything else is a model itself."""
    return os.path.join(path, "model") if os.path.isfile(os.path.join(path, "stage.json")) else path


_Model = TypeVar("_Model", bound=BaseModel)
_Part = TypeVar("_Part", bound=BaseModel)


def _replace(model: _Model, kind: type[_Part], change: Callable[[_Part], _Part]) -> _Model:
    """Return a copy with `change` done to every part of a kind, at whatever depth."""
    update = {}
    for key in type(model).model_fields:
        value = getattr(model, key)
        changed = _change(value, kind, change)
        if changed is not value:
            update[key] = changed
    return model.model_copy(update=update) if update else model


def _change(value: object, kind: type[_Part], change: Callable[[_Part], _Part]) -> object:
    if isinstance(value, kind):
        value = change(value)
    if isinstance(value, BaseModel):
        return _replace(value, kind, change)
    if isinstance(value, list):
        items = [_change(item, kind, change) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value
