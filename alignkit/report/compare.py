"""How two runs differ, in the order in which a difference would explain the next: values, data, template, versions,
figures.

It reads the small files of both runs, opens no weights, and judges nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import RunError
from alignkit.runs.directory import RunDir
from alignkit.runs.files import read_json

_DATA = ("rows", "fingerprint", "kinds", "duplicates", "rejected", "overlap")
_RESULT = ("status", "step", "tokens", "wall_seconds", "tokens_per_second", "peak_memory_bytes")
_SHOWN = 60

Line = tuple[str, Any, Any]


@dataclass(frozen=True)
class Difference:
    """What differs between two runs; a value that a run does not have is None."""

    names: tuple[str, str]
    settings: list[Line]
    data: list[Line]
    versions: list[Line]
    metrics: list[Line]  # all of them, equal ones too

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: section -> key -> the two values."""
        sections = {"settings": self.settings, "data": self.data, "versions": self.versions, "metrics": self.metrics}
        return {
            "runs": list(self.names),
            **{name: {key: [first, second] for key, first, second in lines} for name, lines in sections.items()},
        }

    def tables(self) -> Iterator[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
        """Yield a title, columns and rows for each section."""
        first, second = self.names if self.names[0] != self.names[1] else ("first", "second")
        for title, lines in (
            ("settings", self.settings),
            ("data and template", self.data),
            ("versions", self.versions),
        ):
            rows = [(key, _show(a), _show(b)) for key, a, b in lines] or [("(no difference)", "", "")]
            yield title, ("key", first, second), rows
        figures = [(key, _show(a), _show(b), _change(a, b)) for key, a, b in self.metrics]
        yield "metrics", ("metric", first, second, "change"), figures or [("(none)", "", "", "")]


def compare_runs(first: Path, second: Path) -> Difference:
    """Compare two run directories; raises RunError for one that is not a run."""
    runs = [_open(first), _open(second)]
    stages = [read_json(run.stage) for run in runs]
    return Difference(
        names=(_name(stages[0], first), _name(stages[1], second)),
        settings=_drop_foreign(_different(*(_settings(stage) for stage in stages)), stages),
        data=_different(*(_data(stage) for stage in stages)),
        versions=_different(*(_flatten({"": _versions(stage)}) for stage in stages)),
        metrics=_all(*(_metrics(run) for run in runs)),
    )


def _open(path: Path) -> RunDir:
    run = RunDir(path.expanduser().absolute())
    if not run.stage.is_file():
        raise RunError("is no run: it has no stage.json", where=str(path))
    return run


def _name(stage: Mapping[str, Any], path: Path) -> str:
    return str(path) if len(str(path)) <= 40 else f"{stage.get('recipe')}/{stage.get('stage')}"


def _settings(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Return every value in force, dotted: `stage.` are the recipe's values, `trl.` what they leave to TRL."""
    kept = {key: stage.get(key) for key in ("method", "seed", "start_dir", "model", "lora", "launch", "reward_stages")}
    values = {**(stage.get("options") or {}), **(stage.get("trainer") or {})}
    values.pop("method", None)
    trl = {key: value for key, value in (stage.get("trl") or {}).items() if key not in {*values, *_NOISE}}
    return _flatten({**kept, "stage": values}) | {f"trl.{key}": value for key, value in trl.items()}


# Of TRL's resolved configuration: where it writes.
_NOISE = frozenset({"output_dir", "logging_dir", "run_name", "hub_model_id"})


def _data(stage: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    reports = stage.get("data") or {}
    reports = {"train": reports} if "fingerprint" in reports else reports
    for part, report in reports.items():
        if isinstance(report, dict):
            found |= {f"{part}.{key}": report[key] for key in _DATA if key in report}
    prints = stage.get("fingerprint") or {}
    found |= {key: prints[key] for key in prints if "." not in key and key not in ("seed", "start", "method")}
    return _flatten(found)


def _versions(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {**(stage.get("versions") or {}), "git": (stage.get("git") or {}).get("commit")}


def _metrics(run: RunDir) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if run.result.is_file():
        result = read_json(run.result)
        found |= {key: result.get(key) for key in _RESULT} | dict(result.get("metrics") or {})
    if run.evaluation.is_file():
        for figure in read_json(run.evaluation).get("results", ()):
            if not str(figure.get("slice") or "").startswith(
                ("margin", "chosen", "equal")
            ):  # cut by the run's own rows
                part = f", {figure['slice']}" if figure.get("slice") else ""
                found[f"{figure['metric']}{part} on {figure['data']}"] = figure["value"]
    return found


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = value[0] if len(value) == 1 else {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= _flatten(value, f"{name}." if name else "")
        else:
            flat[name] = value
    return flat


def _different(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Line]:
    return [line for line in _all(first, second) if line[1] != line[2]]


def _drop_foreign(lines: list[Line], stages: list[dict[str, Any]]) -> list[Line]:
    """Leave out TRL's fields that only one of two methods has: that the methods differ says it all."""
    common = {f"trl.{key}" for key in (stages[0].get("trl") or {}).keys() & (stages[1].get("trl") or {}).keys()}
    return [line for line in lines if not line[0].startswith("trl.") or line[0] in common]


def _all(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Line]:
    return [(key, first.get(key), second.get(key)) for key in dict.fromkeys([*first, *second])]


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _change(first: Any, second: Any) -> str:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (first, second))
    return f"{second - first:+.4g}" if numbers else ""
