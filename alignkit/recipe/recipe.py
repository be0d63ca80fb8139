"""A validated recipe, before one of its stages is resolved.

Plain data: nothing here reads files or fills in what depends on the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkit.recipe.schema import EvaluateOptions, LaunchOptions, LoraOptions, ModelOptions, StageOptions


@dataclass(frozen=True)
class StageSection:
    """One stage as the recipe gives it: alignkit's options with their defaults, TRL's fields only where given."""

    name: str
    options: StageOptions
    trainer: Mapping[str, Any]
    group: str | None = None  # the rlaif section that it is a step of


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
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    evaluates: bool = False  # `evaluate:` is written out: `alignkit run` measures at its end

    @property
    def stage_names(self) -> list[str]:
        return list(self.stages)
