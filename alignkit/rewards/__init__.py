"""Scores of answers, for ppo, gold, best-of-N, win rates and evaluation: one class a kind, listed in `kinds`.

What they share is here: the interface of a reward, the answers it scores and the workspace it scores in.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from alignkit.data import Text
from alignkit.feedback.cache import Store
from alignkit.recipe import Stage
from alignkit.recipe.schema import RewardSource


@dataclass
class Answers:
    """Answers to score, each with its prompt, as text or messages; a rollout of PPO is one too."""

    prompts: Sequence[Text]
    completions: Sequence[Text]
    ended: Sequence[bool] = ()  # False for an answer that was cut off; empty: all of them ended
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # of the rows, for reward functions


def join_columns(rows: Iterable[str]) -> dict[str, list[Any]]:
    """The `columns` of rows as a reward gets them: one list a name, None where a row has none."""
    read = [json.loads(text or "{}") for text in rows]
    names = dict.fromkeys(name for row in read for name in row)
    return {name: [row.get(name) for row in read] for name in names}


_Score = Callable[[Sequence[Any]], list[float]]


@dataclass
class Workspace:
    """A device, a cache, and room for one model at a time, for rewards, judges and measured models.
    `once` runs something in one of a job's processes for all of them; `split` lets the processes score a part each."""

    device: str = "auto"
    batch_size: int = 16
    trust_code: bool = False
    folder: Path = field(default_factory=Path.cwd)  # where reward functions are looked up, beside sys.path
    cache: Store | None = field(default_factory=Store)  # None: each score is wanted once
    warnings: list[str] = field(default_factory=list)
    stage: Stage | None = None  # the ppo stage that is trained on the reward
    where: str | None = None  # the place in the recipe, for messages
    once: Callable[[Callable[[], Any]], Any] = lambda ask: ask()
    split: Callable[[Sequence[Any], _Score], list[float]] = lambda items, score: score(items)
    holder: Any = None  # what has weights at the moment, and a method release() that lets go of them

    def take(self, user: Any) -> None:
        """Let `user` hold weights; the model before it is released, so that one at most is in memory."""
        if self.holder is not None and self.holder is not user:
            self.holder.release()
        self.holder = user

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)


def stage_space(stage: Stage, key: str) -> Workspace:
    """Make the workspace of a stage's rewards outside training; each score is wanted once."""
    return Workspace(
        device=stage.launch.device, trust_code=stage.trust_code, folder=Path(stage.recipe_path).resolve().parent,
        cache=None, stage=stage, where=stage.where(f"{stage.name}.{key}"),
    )  # fmt: skip


class Reward(Protocol):
    """A kind of reward. `source` is what a recipe says of it, `key` where: reward or gold of a ppo stage."""

    name: str  # in metrics

    def __init__(self, source: RewardSource, space: Workspace) -> None:
        """Find out whether it can score; weights are loaded when they are needed."""

    def score(self, answers: Answers) -> list[float]:
        """Score each answer: the higher, the better."""

    @staticmethod
    def check(source: RewardSource, stage: Stage, key: str, coming: Collection[str] | None = None) -> str:
        """Raise what would stop a stage, without loading torch; say what it is.
        `coming` are stages that are trained before it; without them, as `alignkit check` asks, it may load more."""

    @staticmethod
    def fingerprint(source: RewardSource, stage: Stage) -> str | None:
        """Hash all that can change a score, None where the recipe says it all."""


def collect_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def name_source(source: str) -> str:
    """Shorten the path of a model for metrics: of runs/NAME/STAGE/model the stage, else the last part."""
    parts = [part for part in Path(source).parts if part not in ("/", "model")]
    return parts[-1] if parts else source
