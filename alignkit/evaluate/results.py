"""eval.json: what was measured on a run, so far; a figure that is measured again replaces its older self.

The file is described in recipes/README.md. Deliberately nothing but figures and what is needed to judge them.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.evaluate.intervals import Figure
from alignkit.report.evaluation import name_all_data
from alignkit.runs.files import disk_failures, read_record, write_json
from alignkit.runs.record import versions

SCHEMA = 1
_LIBRARIES = ("lm_eval", "rouge-score", "sacrebleu")


def describe(
    figures: Sequence[Figure],
    *,
    name: str,
    model: str,
    weights: str,
    seed: int,
    seconds: float,
    warnings: Sequence[str],
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "name": name,
        "model": model,
        "weights": weights,
        "seed": seed,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "wall_seconds": round(seconds, 3),
        "versions": versions() | _library_versions(),
        "warnings": list(warnings),
        "results": [figure.to_dict() for figure in figures],
    }


def merge(before: Mapping[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """Return `now` with the results of `before` that were not measured again; of other weights nothing is kept."""
    if before is None or before.get("schema") != SCHEMA or before.get("weights") != now["weights"]:
        return now
    measured = {_identity(result) for result in now["results"]}
    kept = [result for result in before.get("results", ()) if _identity(result) not in measured]
    # A slice belongs to its whole: the cut into slices may have changed.
    again = {_whole(result) for result in now["results"]}
    kept = [result for result in kept if not (result.get("slice") and _whole(result) in again)]
    warnings = list(dict.fromkeys([*before.get("warnings", ()), *now["warnings"]])) if kept else now["warnings"]
    return {**now, "warnings": warnings, "results": [*kept, *now["results"]]}


def save(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Merge into the file at `path`, whole or not at all, and return what it holds now."""
    merged = merge(read_record(path) or None, data)
    with disk_failures(path.parent, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, merged)
    return merged


def table(results: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Return columns and rows of a table of results."""
    columns = ("metric", "value", "95 % interval", "n", "unit", "on")
    rows = []
    for result, data in zip(results, name_all_data(results), strict=True):
        inner = result["slice"] is not None
        low, high = result["low"], result["high"]
        between = None if low is None else f"{low:.4g} to {high:.4g}"
        name = f"  {result['metric']}, {result['slice']}" if inner else result["metric"]
        rows.append((name, result["value"], between, result["n"], result["unit"] or None, data))
    return columns, rows


def _identity(result: Mapping[str, Any]) -> str:
    return repr((*_parts(result), result.get("slice")))


def _whole(result: Mapping[str, Any]) -> str:
    return repr(_parts(result))


def _parts(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return result.get("metric"), result.get("data"), sorted(result.get("settings", {}).items(), key=str)


def _library_versions() -> dict[str, str]:
    found = {}
    for package in _LIBRARIES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
