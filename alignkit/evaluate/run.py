"""`alignkit eval`: find the model and its rows, measure, and keep what was measured in eval.json.

What is measured is `measure`'s business, what is asked of the command line the caller's.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.evaluate.cache import Cache
from alignkit.evaluate.material import Material
from alignkit.evaluate.measure import Evaluation
from alignkit.evaluate.results import describe, merge, save
from alignkit.evaluate.rows import Measured, read_measured
from alignkit.evaluate.shelf import Shelf
from alignkit.evaluate.subject import Subject, find_subject
from alignkit.models.causal import fingerprint_causal
from alignkit.recipe.schema import EvaluateOptions

_CACHE = "eval-cache.jsonl"


def evaluate(
    source: str,
    options: EvaluateOptions,
    *,
    seed: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    trust_code: bool = False,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measure a model and return what eval.json holds now.

    It is written into the run, or to `out`; a model that is no run and has no `out` leaves nothing. Answers and scores
    are kept beside it. `folder` is where functions are looked up, too. Raises UsageError for what cannot be measured,
    and what loading raises.
    """
    began = time.monotonic()
    subject = find_subject(source, trust_code=trust_code)
    seed = seed if seed is not None else int(subject.stage.get("seed", 0))
    path = out.expanduser().absolute() if out else subject.run.evaluation if subject.run else None
    shelf = Shelf(
        device=device,
        batch_size=options.batch_size,
        trust_code=trust_code,
        cache=Cache(path.with_name(_CACHE) if path else None),
    )
    measured = _read(subject, options, seed)
    for message in measured.warnings if measured else ():
        shelf.warn(message)
    material = Material(subject, options, measured, shelf, seed=seed, folder=folder or Path.cwd())
    figures = Evaluation(material).run()
    for message in shelf.warnings:
        console.warn(message)
    data = describe(
        figures,
        name=subject.name,
        model=subject.source,
        weights=fingerprint_causal(subject.source),
        seed=seed,
        seconds=time.monotonic() - began,
        warnings=shelf.warnings,
    )
    return save(path, data) if path else merge(None, data)


def _read(subject: Subject, options: EvaluateOptions, seed: int) -> Measured | None:
    """Return the rows to measure on; None where only tasks are asked for."""
    wants = options.metrics or ()
    only_tasks = options.tasks and (set(wants) == {"tasks"} or not (wants or options.data or subject.stage))
    if only_tasks:
        return None
    sources, share = (options.data, None) if options.data else subject.held_out()
    return read_measured(sources, share=share, seed=seed, max_rows=options.max_rows)
