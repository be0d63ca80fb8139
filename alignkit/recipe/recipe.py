"""A validated recipe, before one of its stages is resolved.

Plain data: nothing here reads files or fills in what depends on the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from alignkit.recipe.schema import (
    EvaluateOptions,
    LaunchOptions,
    LoraOptions,
    ModelOptions,
    RecipeOptions,
    StageOptions,
)


@dataclass(frozen=True)
class StageSection:
    """One stage as the recipe gives it: alignkit's options with their defaults, TRL's fields only where given."""

    name: str
    options: StageOptions
    trainer: Mapping[str, Any]
    top: RecipeOptions  # the recipe's top level as this stage reads it: seed, model and lora may be swept
    origins: Mapping[str, str]  # places of those three: {"model.path": "recipes/a.yaml:3"}
    group: str | None = None  # the rlaif section that it is a step of
    point: Mapping[str, Any] = field(default_factory=dict)  # its values of what is swept: {"dpo.beta": 0.05}


@dataclass(frozen=True)
class Recipe:
    """What one recipe file says. `origins` maps dotted keys to places: {"dpo.beta": "recipes/a.yaml:7"}."""

    name: str
    path: str  # as messages show it: relative to the working directory when it is below it
    seed: int
    model: ModelOptions
    lora: LoraOptions | None
    launch: LaunchOptions
    stages: Mapping[str, StageSection]  # those under `stages:` first and in that order, then as written
    order: tuple[str, ...]  # what `alignkit run` trains: those under `stages:`, all of them where it is omitted
    origins: Mapping[str, str]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # stages of each rlaif section, in order
    sweeps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # variants of each swept stage, by plain name
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    evaluates: bool = False  # `evaluate:` is written out: `alignkit run` measures at its end

    @cached_property
    def origins_below(self) -> dict[str, dict[str, str]]:
        """`origins` by each beginning of a key up to a dot: the name of a variant may hold dots itself."""
        found: dict[str, dict[str, str]] = {}
        for key, place in self.origins.items():
            for end in (at for at, letter in enumerate(f"{key}.") if letter == "."):
                found.setdefault(key[:end], {})[key] = place
        return found

    @property
    def stage_names(self) -> list[str]:
        return list(self.stages)
