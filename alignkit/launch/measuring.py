"""The last step of `alignkit run`: every finished model measured as the recipe's `evaluate:` says.

What is measured is the evaluate room's business; here is only which runs, and whether anything is left to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.evaluate.request import name_runs
from alignkit.recipe import Stage
from alignkit.recipe.schema import FEEDBACK, EvaluateOptions
from alignkit.runs.files import disk_failures, read_json, write_json
from alignkit.runs.layout import RunDir

NAME = "evaluate"
RECORD = "evaluated.json"


@dataclass(frozen=True)
class Measuring:
    """The models of a run and what is asked of them."""

    sources: tuple[str, ...]
    options: EvaluateOptions
    trust_code: bool

    @classmethod
    def of(cls, stages: Sequence[Stage], options: EvaluateOptions, runs: Mapping[str, str]) -> Measuring:
        """Return what to measure of these stages; `runs` are the run directories of all stages that options may name.

        Raises UsageError for a name that is neither a stage nor a path.
        """
        sources = tuple(stage.run_dir for stage in stages if stage.method not in FEEDBACK)
        return cls(sources, name_runs(options, runs), any(stage.trust_code for stage in stages))

    @property
    def _record(self) -> Path:
        """What was asked last, beside the runs of the recipe."""
        return Path(self.sources[0]).expanduser().absolute().parent / RECORD

    def is_done(self) -> bool:
        """Tell whether just this has been measured; a run that was trained anew has lost its eval.json."""
        if not self.sources or not self._record.is_file():
            return False
        record = read_json(self._record)
        return record["asked"] == self._asked and all(_figures(source).is_file() for source in record["measured"])

    def run(self) -> Iterator[dict[str, Any]]:
        """Measure one model after another and yield what its eval.json holds now."""
        from alignkit.launch.environment import prepare_environment

        prepare_environment()
        from alignkit.evaluate.run import evaluate_all

        self._record.unlink(missing_ok=True)
        yield from evaluate_all(
            self.sources, self.options, seed=None, out=None, device="auto", trust_code=self.trust_code,
            folder=Path.cwd(), skip=True,
        )  # fmt: skip
        measured = [source for source in self.sources if _figures(source).is_file()]
        with disk_failures(self._record.parent, RECORD):
            write_json(self._record, {"asked": self._asked, "measured": measured})

    @property
    def _asked(self) -> str:
        """Return what tells one request from another; not how many rows go through at a time."""
        asked = [self.sources, self.options.model_dump(mode="json", exclude={"batch_size"})]
        return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()


def _figures(source: str) -> Path:
    return RunDir(Path(source).expanduser().absolute()).evaluation
