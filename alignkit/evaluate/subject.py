"""What is evaluated: a run, a directory or a hub id, and what a run says of its own data and reference.

It reads the small files of a run and opens no weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import DataError, RunError
from alignkit.models.files import find_model_dir, inspect_model_dir, is_builtin
from alignkit.recipe.lineage import RUNS
from alignkit.recipe.schema import DataSource
from alignkit.runs.directory import RunDir
from alignkit.runs.files import read_json

_REFERENCED = ("dpo", "ppo")  # methods that hold the policy near where it started


@dataclass(frozen=True)
class Subject:
    """A model to measure; `run` is None for one that no run of ours has made."""

    source: str  # what is loaded: the run, the directory or the hub id
    run: RunDir | None
    reward: bool
    stage: dict[str, Any] = field(default_factory=dict)  # stage.json

    @property
    def name(self) -> str:
        """Return a short name for tables: recipe/stage, or the source."""
        return f"{self.stage['recipe']}/{self.stage['stage']}" if self.stage else self.source

    @property
    def method(self) -> str | None:
        """Return how it was trained, None where that is not known."""
        return self.stage.get("method")

    @property
    def beta(self) -> float:
        """Return beta of a dpo stage, with which its implicit reward is scaled."""
        return float(self.stage.get("trainer", {}).get("beta", 0.1))

    def held_out(self) -> tuple[list[DataSource], float | None]:
        """Return the rows the run kept out of training, and which share of them where it was a share.

        Of builtin data without held-out rows it is the split test. Raises DataError when nothing was kept out.
        """
        options = self.stage.get("options", {})
        kept = options.get("eval")
        trained = [DataSource(**source) for source in options.get("data", ())]
        if isinstance(kept, list):
            return [DataSource(**source) for source in kept], None
        if trained and isinstance(kept, float):
            return trained, kept
        if trained and all(source.path.startswith("builtin:") for source in trained):
            return [source.model_copy(update={"split": "test", "weight": 1.0}) for source in trained], None
        where = f"{self.name} kept no rows out of training" if self.stage else f"{self.source} is no run of alignkit"
        raise DataError(f"{where}: name rows to measure on with --data, or evaluate.data in the recipe")

    def reference(self) -> str | None:
        """Return what a dpo or ppo run started from, None for others and where that is not there any more."""
        if self.run is None or self.method not in _REFERENCED:
            return None
        start = self.stage.get("start_dir")
        candidates = [start, str(self.run.path.parent / str(self.stage.get("start_stage")) / "model")] if start else []
        if not start and (self.run.base / "config.json").exists():
            return str(self.run.base)
        for candidate in candidates:
            if Path(candidate).is_dir():
                return str(candidate)
        model = self.stage.get("model", {})
        scratch = is_builtin(model.get("path", "")) or model.get("init") == "scratch"
        return None if start or scratch else model.get("path")


def find_subject(source: str, *, trust_code: bool) -> Subject:
    """Find a model by the name of a run, a directory or a hub id; raises RunError or ModelError."""
    path = Path(source).expanduser()
    _refuse_near_misses(source, path)
    if (path / "stage.json").is_file():
        run = RunDir(path.absolute())
        if not run.model.is_dir():
            raise RunError("has no model yet: finish the run first", where=source)
        stage = read_json(run.stage)
        return Subject(str(run.path), run, inspect_model_dir(run.model, trust_code=trust_code).reward, stage)
    directory = find_model_dir(source)
    if directory is None:
        return Subject(source, None, False)
    if (directory.parent / "stage.json").is_file() and directory.name == "model":
        return find_subject(str(directory.parent), trust_code=trust_code)
    return Subject(str(directory), None, inspect_model_dir(directory, trust_code=trust_code).reward)


def list_siblings(source: str) -> dict[str, str]:
    """Return the other runs beside a run, by their names; none of what is no run."""
    path = Path(source).expanduser().absolute()
    if not (path / "stage.json").is_file():
        return {}
    return {run.name: os.path.relpath(run) for run in _list_runs(path.parent)}


def _refuse_near_misses(source: str, path: Path) -> None:
    """Raise RunError for the directory of a recipe's runs, and for a stage's name without its directory."""
    if path.is_dir() and not (path / "config.json").exists() and (runs := _list_runs(path)):
        raise RunError(f"holds the runs {', '.join(run.name for run in runs)}; name one of them", where=source)
    if len(path.parts) == 1 and not path.exists():
        known = [str(found.parent) for found in sorted(Path(RUNS).glob(f"*/{source}/stage.json"))]
        if known:
            raise RunError(f"is not there; did you mean {' or '.join(known)}?", where=source)


def _list_runs(path: Path) -> list[Path]:
    return sorted(found.parent for found in path.glob("*/stage.json"))
