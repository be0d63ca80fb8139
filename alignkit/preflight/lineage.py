"""What a stage needs of other stages of its recipe, and whether they have made it.

Looks at files only. Models and rewards from elsewhere are the business of `rewards`, `feedback` and `models`.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from alignkit.errors import Problem, RunError
from alignkit.preflight.feedback import list_feedback_models
from alignkit.recipe import Stage
from alignkit.recipe.schema import DataSource, PpoOptions
from alignkit.runs.directory import RunDir


@dataclass(frozen=True)
class Need:
    """What one stage has from another: a model directory, or a file of rows."""

    stage: str  # the one that makes it
    path: str
    key: str  # of the stage that needs it, without its name
    rows: bool = False

    def is_made(self) -> bool:
        """Tell whether it is there; rows only count when all of them are."""
        return RunDir(Path(self.path).parent).is_finished() if self.rows else Path(self.path).is_dir()


def list_needs(stage: Stage) -> list[Need]:
    """Return everything a stage has from stages of its recipe."""
    needs = []
    if stage.start_stage is not None and stage.start_dir is not None:
        needs.append(Need(stage.start_stage, stage.start_dir, "start_from"))
    if isinstance(stage.options, PpoOptions):
        for key, rewards in (("reward", stage.options.reward), ("gold", stage.options.gold or [])):
            for reward in rewards:
                if (name := stage.reward_stages.get(reward.model or "")) and reward.model:
                    needs.append(Need(name, reward.model, key))
    for key, source in list_data(stage):
        if name := stage.source_stages.get(source.path):
            needs.append(Need(name, source.path, key, rows=True))
    for key, model in list_feedback_models(stage):
        if model.model and (name := stage.source_stages.get(model.model)):
            needs.append(Need(name, model.model, key))
    return needs


def list_data(stage: Stage) -> Iterator[tuple[str, DataSource]]:
    """Yield every source of rows of a stage with its key."""
    options = stage.options
    for key in ("data", "eval", "normalize_data", "mix", "check"):
        sources = getattr(options, key, None)
        yield from ((key, source) for source in (sources if isinstance(sources, list) else ()))
    for key in ("ptx", "helpful"):
        part = getattr(options, key, None)
        yield from ((f"{key}.data", source) for source in (part.data if part is not None else ()))


def require_made(stage: Stage, *, coming: Collection[str] = ()) -> None:
    """Raise RunError for everything that a stage needs and that is not made; `coming` are stages that run before it."""
    problems = []
    for need in list_needs(stage):
        if need.stage in coming or need.is_made():
            continue
        verb = {"start_from": "starts from", "reward": "is scored by", "gold": "is scored by"}.get(need.key, "needs")
        state = "has not been run to its end" if need.rows else "has not been trained to its end"
        instead = "the file of rows itself" if need.rows else f"another {need.key.split('.')[-1]}"
        problems.append(
            Problem(
                f"{stage.name} {verb} {need.stage}, which {state}; {'run' if need.rows else 'train'} --stage "
                f"{need.stage} of {shlex.quote(stage.recipe_path)} first, or name {instead}",
                stage.where(f"{stage.name}.{need.key}"),
            )
        )
    if problems:
        raise RunError(problems)


def without_unmade(sources: list[DataSource], stage: Stage, *, coming: Collection[str] = ()) -> list[DataSource]:
    """Return the sources that can be read now: not the rows of a stage that has yet to make them."""
    unmade = {need.path for need in list_needs(stage) if need.rows and (need.stage in coming or not need.is_made())}
    return [source for source in sources if source.path not in unmade]
