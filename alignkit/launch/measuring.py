"""The last step of `alignkit run`: every finished model measured as the recipe's `evaluate:` says.

What is measured is the evaluate room's business; here is only which runs, and whether anything is left to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.evaluate.request import digest, name_runs
from alignkit.recipe import Stage
from alignkit.recipe.schema import FEEDBACK, EvaluateOptions
from alignkit.runs.files import read_json
from alignkit.runs.layout import RunDir

NAME = "evaluate"


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

    def is_done(self) -> bool:
        """Tell whether eval.json of every model answers just this; a run that was trained anew has none."""
        asked = digest(self.options)
        files = [RunDir(Path(source).expanduser().absolute()).evaluation for source in self.sources]
        return all(file.is_file() and read_json(file).get("asked") == asked for file in files)

    def run(self) -> Iterator[dict[str, Any]]:
        """Measure one model after another and yield what its eval.json holds now."""
        from alignkit.launch.environment import prepare_environment

        prepare_environment()
        from alignkit.evaluate.run import evaluate_all

        yield from evaluate_all(
            self.sources, self.options, seed=None, out=None, device="auto", trust_code=self.trust_code,
            folder=Path.cwd(), skip=True,
        )  # fmt: skip
