"""One sitting of a stage that makes rows: its run directory, its store, and how it begins and ends.

What the rows are is the business of `critique` and `label`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.data import DataReport, Rejects
from alignkit.feedback.desk import Desk
from alignkit.feedback.stop import Stop, catch_signals
from alignkit.feedback.store import Store
from alignkit.recipe.stage import Stage
from alignkit.report.publish import leave_finished, show
from alignkit.runs.directory import Result, RunDir, compare_fingerprints, copy_recipe, write_result
from alignkit.runs.files import replacing, write_json
from alignkit.runs.manifest import find_damaged_product
from alignkit.runs.record import JsonLines, git_state, versions

ROWS, STORE, REPORT = "rows.jsonl", "feedback.jsonl", "report.json"


@dataclass
class Session:
    """An open run directory and what is at hand in it."""

    stage: Stage
    run: RunDir
    store: Store
    stop: Stop
    rejects: Rejects = field(default_factory=Rejects)
    began: float = field(default_factory=time.monotonic)

    @property
    def desk(self) -> Desk:
        return Desk(self.stage.name, self.store, self.stop)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def find_finished(self, fingerprint: Mapping[str, Any], allow_change: Sequence[str]) -> Result | None:
        """Return the result of a finished run; raises RunError when its settings were others."""
        for change in compare_fingerprints(self.run, fingerprint, allow_change=allow_change):
            console.warn(f"{self.stage.name}: going on with a changed setting: {change}")
        if not self.run.is_finished():
            return None
        if (damage := find_damaged_product(self.run.path)) is not None:
            console.warn(f"{self.stage.name}: {damage}; it is made again from the answers in {STORE}")
            return None
        return leave_finished(self.run)

    def begin(self, fingerprint: Mapping[str, Any], report: DataReport, *, note: str) -> None:
        """Write stage.json and say what was read."""
        copy_recipe(self.run, Path(self.stage.recipe_path))
        left = f", {self.rejects.count} left out (rejects.jsonl)" if self.rejects.count else ""
        kept = f", {len(self.store)} answers are there already" if len(self.store) else ""
        console.note(f"{self.stage.name}: {note}{left}{kept}")
        record = {
            **self.stage.to_dict(),
            "fingerprint": dict(fingerprint),
            "data": report.to_dict(),
            "versions": versions(),
            "git": git_state(Path(self.stage.recipe_path).resolve().parent),
        }
        write_json(self.run.stage, record)

    def write_rows(self, rows: Iterable[Mapping[str, Any]], name: str = ROWS) -> int:
        """Replace a file of rows in one step; return how many it holds."""
        count = 0
        with replacing(self.run.path / name) as file:
            for count, row in enumerate(rows, 1):  # noqa: B007
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return count

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Replace report.json, and rejects.jsonl where rows were left out."""
        write_json(self.run.path / REPORT, dict(report))
        self.rejects.write(self.run.rejects)

    def log(self, step: int, **facts: float) -> None:
        """Append a line to metrics.jsonl."""
        JsonLines(self.run.metrics).append({"step": step, **facts})

    def finish(self, num_rows: int, *, metrics: Mapping[str, float], tokens: int) -> Result:
        """Write the result; the run is finished."""
        result = Result(
            stage=self.stage.name,
            status="finished",
            step=num_rows,
            model_dir="",
            metrics=dict(metrics),
            tokens=tokens,
            wall_seconds=round(self.seconds, 3),
            tokens_per_second=round(tokens / max(self.seconds, 1e-9), 1),
        )
        write_result(self.run, result.to_dict(), [self.run.path / ROWS])
        show(self.run)
        return result


@contextmanager
def open_session(stage: Stage, run_dir: Path) -> Iterator[Session]:
    """Open the store of a run directory that the caller has locked, with stop signals heard while it is open."""
    run = RunDir(run_dir.absolute())
    with catch_signals() as stop:
        store = Store(run.path / STORE)
        try:
            yield Session(stage, run, store, stop)
        finally:
            store.close()
            if not len(store):
                (run.path / STORE).unlink(missing_ok=True)  # leave nothing of a stage that was refused
