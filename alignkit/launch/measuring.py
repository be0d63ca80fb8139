"""The last step of `alignkit run`: every finished model measured as the recipe's `evaluate:` says.

What is measured is the evaluate room's business; here is only which runs, and whether anything is left to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.evaluate.options import request_stages
from alignkit.preflight.requirements import require_held_out
from alignkit.recipe import Recipe
from alignkit.recipe.schema import EvaluateOptions
from alignkit.runs.directory import RunDir
from alignkit.runs.files import read_record, write_json

NAME = "evaluate"
RECORD = "evaluated.json"


@dataclass(frozen=True)
class Measuring:
    """The models of a run, each with what is asked of it."""

    requests: tuple[tuple[str, EvaluateOptions], ...]
    trust_code: bool

    @classmethod
    def of(cls, recipe: Recipe, names: Sequence[str], *, trust_code: bool) -> Measuring | None:
        """Return what to measure of these stages, None where the recipe asks for nothing or none of them has a model.

        Raises UsageError for a name that is neither a stage nor a path, and where no stage has rows to measure on.
        """
        for doubt in require_held_out(recipe, names):
            console.warn(doubt)
        requests = tuple(request_stages(recipe, recipe.evaluate, names)) if recipe.evaluates else ()
        return cls(requests, trust_code) if requests else None

    @property
    def _record(self) -> Path:
        """What was asked last, beside the runs of the recipe."""
        return Path(self.requests[0][0]).expanduser().absolute().parent / RECORD

    def is_done(self) -> bool:
        """Tell whether just this has been measured; a run that was trained anew has lost its eval.json."""
        record = read_record(self._record)
        if record.get("asked") != self._asked:
            return False
        return all(read_record(_figures(source)) for source in record["measured"])

    def run(self) -> Iterator[dict[str, Any]]:
        """Measure one model after another and yield what its eval.json holds now."""
        from alignkit.evaluate.run import evaluate_all

        self._record.unlink(missing_ok=True)
        yield from evaluate_all(
            self.requests, seed=None, out=None, device="auto", trust_code=self.trust_code,
            folder=Path.cwd(), skip=True,
        )  # fmt: skip
        measured = [source for source, _ in self.requests if _figures(source).is_file()]
        write_json(self._record, {"asked": self._asked, "measured": measured})

    @property
    def _asked(self) -> str:
        """Return what tells one request from another; not how many rows go through at a time."""
        asked = [(source, options.model_dump(mode="json", exclude={"batch_size"})) for source, options in self.requests]
        return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()


def _figures(source: str) -> Path:
    return RunDir(Path(source).expanduser().absolute()).evaluation
