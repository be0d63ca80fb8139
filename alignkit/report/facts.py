"""The files of a run directory in any state, read into one object, without the secrets they may hold."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.console import redact
from alignkit.errors import RunError
from alignkit.recipe.schema import TASKS
from alignkit.runs.directory import RunDir
from alignkit.runs.files import read_json, read_lines, read_record

_SHOWN_REJECTS = 20
_SHOWN_LABELS = 8
_SHOWN_ERROR_CHARS = 4000
# What the trainers count along with the metrics, and what a reader of curves does not look for.
_BOOKKEEPING = re.compile(r"step|epoch|.*runtime|.*(samples|steps)_per_second|.*num_tokens|episodes")


@dataclass(frozen=True)
class Facts:
    """One run: its files as plain data, absent ones empty."""

    path: Path
    stage: dict[str, Any]  # stage.json
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    evaluation: dict[str, Any]
    feedback: dict[str, Any]  # report.json of a critique or label stage
    labels: list[dict[str, Any]]  # the first ones of a label stage
    warnings: list[dict[str, Any]]
    preview: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    num_rejects: int
    error: str  # the end of error.log; of a finished run empty
    recipe: str

    @property
    def name(self) -> str:
        return str(self.stage.get("stage", self.path.name))

    @property
    def full_name(self) -> str:
        return "/".join(part for part in (str(self.stage.get("recipe", "")), self.name) if part)

    @property
    def method(self) -> str:
        return str(self.stage.get("method", ""))

    @property
    def task(self) -> str | None:
        """The objective of a classifier, None for other runs."""
        name = (self.stage.get("options") or {}).get("objective")
        return name if name in TASKS else None

    @property
    def sources(self) -> list[dict[str, Any]]:
        return (self.stage.get("data") or {}).get("sources") or []

    @property
    def is_finished(self) -> bool:
        return self.result.get("status") == "finished"

    @property
    def step(self) -> int:
        """The last optimizer step that is known to have been taken."""
        return int(self.result.get("step") or max((row.get("step", 0) for row in self.metrics), default=0))

    @property
    def num_steps(self) -> int | None:
        """How many steps were planned; None where only the length of the data says so and the run is not finished."""
        planned = self.stage.get("trl", {}).get("max_steps", -1)
        return int(planned) if planned and planned > 0 else (self.step if self.is_finished else None)

    @property
    def parents(self) -> list[str]:
        """The stages of the same recipe that the run needs: its start, then its reward models."""
        start = self.stage.get("start_stage")
        return [*([start] if start else []), *(self.stage.get("reward_stages") or {}).values()]

    def series(self, name: str) -> list[tuple[float, float]]:
        """List (step, value) of one metric; a value that is not finite is NaN, and the last one of a step counts."""
        found: dict[float, float] = {}
        for row in self.metrics:
            value = row.get(name)
            if value in ("nan", "inf", "-inf"):  # as `JsonLines` writes them
                found[float(row["step"])] = float("nan")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                found[float(row["step"])] = float(value)
        return sorted(found.items())

    def metric_names(self) -> list[str]:
        """List the names of all metrics in the order of their first appearance, held-out ones without prefix."""
        names = (name.removeprefix("eval_") for row in self.metrics for name in row)
        return [name for name in dict.fromkeys(names) if not _BOOKKEEPING.fullmatch(name)]

    def mean_of_last(self, name: str) -> tuple[float | None, int]:
        """Average the last tenth of a metric's logged values, ten of them at most, and say how many those are."""
        values = [value for _, value in self.series(name)]
        number = min(max(len(values) // 10, 1), 10)
        return (sum(values[-number:]) / number if values else None), number

    def last(self, name: str) -> float | None:
        """Find the final value of a metric: that of result.json, or the newest logged one."""
        value = self.result.get("metrics", {}).get(name)
        points = self.series(name)
        return float(value) if isinstance(value, int | float) else (points[-1][1] if points else None)


def read_facts(path: Path) -> Facts:
    """Read a run directory; records it can do without are left out with a warning where they are damaged."""
    run = RunDir(path)
    if not run.stage.is_file():
        raise RunError("is no run: it has no stage.json; name a run directory such as runs/demo/sft", where=str(path))
    rejects = read_lines(run.rejects)
    error, recipe = (
        file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        for file in (run.error_log, run.recipe)
    )
    found = {
        "stage": read_json(run.stage), "result": read_record(run.result), "evaluation": read_record(run.evaluation),
        "metrics": read_lines(run.metrics), "samples": read_lines(run.samples), "warnings": read_lines(run.warnings),
        "feedback": read_record(run.path / "report.json"),
        "labels": read_lines(run.path / "labels.jsonl")[:_SHOWN_LABELS],
        "preview": read_record(run.preview).get("rows", []), "rejects": rejects[:_SHOWN_REJECTS], "recipe": recipe,
        "error": "" if run.result.is_file() else error[-_SHOWN_ERROR_CHARS:],
    }  # fmt: skip
    return Facts(path=run.path, num_rejects=len(rejects), **_clean(found))


def _clean(value: Any) -> Any:
    """Replace every secret in the texts of plain data."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value


def find_runs(directory: Path) -> list[Path]:
    """Find the run directories right below `directory`, oldest first; those that --force set aside do not count."""
    stages = [path for path in directory.glob("*/stage.json") if ".old-" not in path.parent.name]
    return [path.parent for path in sorted(stages, key=lambda path: (path.stat().st_mtime, str(path)))]


def order_runs(runs: Sequence[Facts]) -> list[Facts]:
    """Order the runs so that each comes after the one it starts from and those that reward it, else as given."""
    left, done = list(runs), list[Facts]()
    while left:
        waiting = {run.name for run in left}
        ready = next((run for run in left if not waiting & ({*run.parents} - {run.name})), left[0])
        left.remove(ready)
        done.append(ready)
    return done
