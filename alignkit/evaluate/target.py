"""The model that is evaluated, a run, a directory or a hub id, with its reference and the rows it is measured on."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.data import DataReport, Rejects, Row, read_rows, split_eval
from alignkit.data.rows import Text, fingerprint_prompt, take_prompt
from alignkit.errors import DataError, RunError
from alignkit.models.files import find_model_dir, inspect_model_dir, is_builtin
from alignkit.recipe.methods import StageOptions
from alignkit.recipe.schema import DataSource, LaunchOptions, ModelOptions
from alignkit.recipe.stage import Stage
from alignkit.runs.directory import RunDir
from alignkit.runs.files import read_json

_REFERENCED = ("dpo", "ppo")  # methods that hold the policy near where it started


@dataclass(frozen=True)
class Target:
    """A model to measure; `run` is None for one that no run of ours has made."""

    source: str  # what is loaded: the run, the directory or the hub id
    run: RunDir | None
    reward: bool
    stage: dict[str, Any] = field(default_factory=dict)  # stage.json
    head: dict[str, Any] | None = None  # what a classifier tells apart

    @property
    def name(self) -> str:
        """A short name for tables: recipe/stage, or the source."""
        return f"{self.stage['recipe']}/{self.stage['stage']}" if self.stage else self.source

    @property
    def beta(self) -> float:
        """beta of a dpo stage, with which its implicit reward is scaled."""
        return float(self.stage.get("trainer", {}).get("beta", 0.1))

    def held_out(self) -> tuple[list[DataSource], float | None]:
        """Find the rows kept out of training (of builtin data split test), and their share; DataError for none."""
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
        """Find what a dpo or ppo run started from, None for others and where that is not there any more."""
        return self.start() if self.stage.get("method") in _REFERENCED else None

    @property
    def start_name(self) -> str:
        """The stage a run started from, or the model; empty of what is no run."""
        return str(self.stage.get("start_stage") or self.stage.get("model", {}).get("path", ""))

    def start(self) -> str | None:
        """Find the model a run started from, None for initial weights and where it is not there any more."""
        if self.run is None:
            return None
        if start := self.stage.get("start_dir"):
            beside = str(self.run.path.parent / str(self.stage.get("start_stage")) / "model")
            return next((str(path) for path in (start, beside) if Path(path).is_dir()), None)
        if (self.run.base / "config.json").exists():
            return str(self.run.base)
        model = self.stage.get("model", {})
        return None if is_builtin(model.get("path", "")) or model.get("init") == "scratch" else model.get("path")


def find_target(source: str, *, trust_code: bool) -> Target:
    """Find a model by the name of a run, a directory or a hub id; raises RunError or ModelError."""
    path = Path(source).expanduser()
    if (path / "stage.json").is_file():
        run = RunDir(path.absolute())
        if not run.model.is_dir():
            raise RunError("has no model yet: finish the run first", where=source)
        files = inspect_model_dir(run.model, trust_code=trust_code)
        return Target(str(run.path), run, files.reward, read_json(run.stage), files.head)
    directory = find_model_dir(source)
    if directory is None:
        return Target(source, None, False)
    if (directory.parent / "stage.json").is_file() and directory.name == "model":
        return find_target(str(directory.parent), trust_code=trust_code)
    files = inspect_model_dir(directory, trust_code=trust_code)
    return Target(str(directory), None, files.reward, head=files.head)


def list_siblings(source: str) -> dict[str, str]:
    """List the runs beside a run, by their names; none of what is no run."""
    path = Path(source).expanduser().absolute()
    beside = sorted(path.parent.glob("*/stage.json")) if (path / "stage.json").is_file() else []
    return {found.parent.name: os.path.relpath(found.parent) for found in beside}


def find_trained(target: Target, rows: Sequence[Row]) -> dict[str, Any] | None:
    """Count the rows whose prompt the run or one that it was made from was trained on; None where none is known of."""
    if target.run is None:
        return None
    beside, fingerprints_N = target.run.path.parent, np.asarray([fingerprint_prompt(row) for row in rows], np.uint64)
    found_N, names = np.zeros(len(rows), bool), []
    made_from = [Path(str(entry.get("path"))).parent for entry in target.stage.get("lineage") or []]
    for path in dict.fromkeys([*made_from, target.run.path]):
        run = next((run for run in (RunDir(path), RunDir(beside / path.name)) if run.prompts.is_file()), None)
        if run is not None and (known_N := np.isin(fingerprints_N, np.fromfile(run.prompts, np.uint64))).any():
            found_N |= known_N
            names.append(path.name)
    return {"by": names, "rows": int(found_N.sum()), "of": len(rows)} if names else None


class _Options(StageOptions):
    method: Any = "eval"


def read_measured(
    sources: Sequence[DataSource], *, share: float | None, seed: int, max_rows: int, warn: Callable[[str], None],
    template: bool = False, method: str | None = None, held_out: bool = True,
) -> tuple[list[Row], str]:  # fmt: skip
    """Read the first `max_rows` rows, an equal part of each source, and name them; with `share` those held out, or not.
    With `template` prompts and answers are turns of a chat, unless a source says otherwise; `method` reads them as that
    method or objective does. Rows that do not fit are left out with a warning. Raises DataError when no row is left."""
    rows: list[Row] = []
    each = -(-max_rows // len(sources))
    for source in sources:
        rejects, report = Rejects(), DataReport()
        if share is None:
            source = source.model_copy(update={"max_rows": min(source.max_rows or each, each)})
        stage = _stage([source], seed)
        found = read_rows(stage, [source], report=report, rejects=rejects, template=template, method=method)
        if share is not None:
            found = (row for is_held_out, row in split_eval(found, share, seed) if is_held_out == held_out)
        rows += islice(found, each)
        if report.rejected:
            first = f" (first: {rejects.first[0]})" if rejects.first else ""
            warn(f"{report.rejected} rows of {source.path} were left out{first}")
    if not rows:
        raise DataError(f"no row is left of {', '.join(source.path for source in sources)}")
    label = ", ".join(source.path if share is not None else f"{source.path}[{source.split}]" for source in sources)
    return rows[:max_rows], label + (f" (held-out {share:g})" if share is not None else "")


def _stage(sources: list[DataSource], seed: int) -> Stage:
    return Stage(
        recipe_name="eval", recipe_path="eval", name="eval", seed=seed, model=ModelOptions(path="none"), lora=None,
        launch=LaunchOptions(), options=_Options(data=sources, on_bad_row="skip"), trainer={}, origins={}, run_dir="",
    )  # fmt: skip


def split_answer(row: Row) -> tuple[Text, Text | None] | None:
    """Split a row into prompt and best answer (of a conversation the last one) or None; None for raw text."""
    try:
        prompt = take_prompt(row).prompt
    except ValueError:
        return None
    if row.kind == "text":
        return None
    if row.kind == "messages":
        content = row.completions[0]
        return prompt, (content[len(prompt) :] if isinstance(content, list) else []) or None
    if row.kind == "unpaired" and not row.label:
        return prompt, None
    best = 1 if row.kind == "pair" and row.label is not None and row.label < 0.5 else 0
    return prompt, row.completions[best] if row.completions else None
