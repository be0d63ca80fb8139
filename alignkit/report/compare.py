"""How two runs differ, in the order in which a difference would explain the next: settings, data, versions, figures."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import RunError
from alignkit.report.evaluation import OF_THE_RUN, name_all_data
from alignkit.runs.directory import RunDir
from alignkit.runs.files import read_json, read_record

_DATA = ("rows", "fingerprint", "kinds", "duplicates", "rejected", "overlap")
_RESULT = ("status", "step", "tokens", "wall_seconds", "tokens_per_second", "peak_memory_bytes")
_PATHS = ("output_dir", "logging_dir", "run_name", "hub_model_id")  # of TRL's configuration: where it writes
_SHOWN = 60

_Figures = dict[str, tuple[Any, dict[str, Any]]]
Pairs = dict[str, tuple[Any, Any]]  # key -> the values of both runs, None where a run has none


@dataclass(frozen=True)
class Difference:
    """What differs between two runs."""

    runs: tuple[str, str]
    settings: Pairs
    data: Pairs
    versions: Pairs
    metrics: Pairs  # all of them, equal ones too

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tables(self) -> Iterator[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
        names = self.runs if self.runs[0] != self.runs[1] else ("first", "second")
        sections = {"settings": self.settings, "data and template": self.data, "versions": self.versions}
        for title, pairs in sections.items():
            rows = [(key, _show(a), _show(b)) for key, (a, b) in pairs.items()]
            yield title, ("key", *names), rows or [("(no difference)", "", "")]
        figures = []
        for key, (a, b) in self.metrics.items():
            are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (a, b))
            figures.append((key, _show(a), _show(b), f"{b - a:+.4g}" if are_numbers else ""))
        yield "metrics", ("metric", *names, "change"), figures or [("(none)", "", "", "")]


def compare_runs(first: Path, second: Path) -> Difference:
    """Compare two run directories; raises RunError for one that is not a run."""
    for path in (first, second):
        if not RunDir(path).stage.is_file():
            raise RunError("is no run: it has no stage.json", where=str(path))
    one, other = (read_json(RunDir(path).stage) for path in (first, second))
    # That the methods differ says it all: TRL's fields that only one of them has are left out.
    of_both = {f"trl.{key}" for key in (one.get("trl") or {}).keys() & (other.get("trl") or {}).keys()}
    settings = _pair(_settings(one), _settings(other))
    names = [str(path) if len(str(path)) <= 40 else f"{stage.get('recipe')}/{stage.get('stage')}"
             for path, stage in ((first, one), (second, other))]  # fmt: skip
    versions = [(each.get("versions") or {}) | {"git": (each.get("git") or {}).get("commit")} for each in (one, other)]
    return Difference(
        (names[0], names[1]),
        {key: pair for key, pair in settings.items() if not key.startswith("trl.") or key in of_both},
        _pair(_data(one), _data(other)),
        _pair(*versions),
        _pair_figures(_metrics(RunDir(first), one), _metrics(RunDir(second), other)),
    )


def _pair(first: Mapping[str, Any], second: Mapping[str, Any]) -> Pairs:
    pairs = {key: (first.get(key), second.get(key)) for key in dict.fromkeys([*first, *second])}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


def _pair_figures(first: _Figures, second: _Figures) -> Pairs:
    """Put like beside like: figures of other methods, rows or settings stand apart, with what differs."""
    pairs: Pairs = {}
    for name in dict.fromkeys([*first, *second]):
        (a, of_a), (b, of_b) = first.get(name, (None, None)), second.get(name, (None, None))
        if of_a is None or of_b is None or of_a == of_b:
            pairs[name] = (a, b)
            continue
        keys = [key for key in {**of_a, **of_b} if of_a.get(key) != of_b.get(key)]
        names = [f"{name}, {', '.join(f'{key} {of.get(key)}' for key in keys)}" for of in (of_a, of_b)]
        pairs |= {names[0]: (a, None), names[1]: (None, b)}
    return pairs


def _settings(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Collect every value in force, dotted: `stage.` are the recipe's values, `trl.` what they leave to TRL."""
    kept = {key: stage.get(key) for key in ("method", "seed", "start_dir", "model", "lora", "launch", "reward_stages")}
    values = {**(stage.get("options") or {}), **(stage.get("trainer") or {})}
    values.pop("method", None)
    trl = {f"trl.{key}": value for key, value in (stage.get("trl") or {}).items() if key not in (*values, *_PATHS)}
    return _flatten({**kept, "stage": values}) | trl


def _data(stage: Mapping[str, Any]) -> dict[str, Any]:
    reports, prints = stage.get("data") or {}, stage.get("fingerprint") or {}
    parts = {"train": reports} if "fingerprint" in reports else reports
    found: dict[str, Any] = {part: {key: report[key] for key in _DATA if key in report}
                             for part, report in parts.items() if isinstance(report, dict)}  # fmt: skip
    found |= {key: prints[key] for key in prints if "." not in key and key not in ("seed", "start", "method")}
    return _flatten(found)


def _metrics(run: RunDir, stage: Mapping[str, Any]) -> _Figures:
    """Collect what came out, each with what must be equal for it to be compared."""
    result, method = read_json(run.result) if run.result.is_file() else {}, {"method": stage.get("method")}
    num_held_out = (stage.get("eval_lengths") or {}).get("num_rows")
    rows = [num_held_out, (stage.get("options") or {}).get("eval"), _data(stage).get("data")]
    found: _Figures = {key: (result.get(key), {}) for key in _RESULT if result}
    for key, value in (result.get("metrics") or {}).items():
        if key.startswith("eval_") and num_held_out:
            found[f"{key} on {num_held_out} held-out rows"] = value, {**method, "held out": rows}
        else:
            found[key] = value, method
    results = read_record(run.evaluation).get("results", [])
    for figure, data in zip(results, name_all_data(results), strict=True):
        part = str(figure.get("slice") or "")
        if not part.startswith(("margin", "chosen", "equal")):  # those are cut by the run's own rows
            settings = {key: value for key, value in (figure.get("settings") or {}).items() if key not in OF_THE_RUN}
            found[f"{figure['metric']}{f', {part}' if part else ''} on {data}"] = figure["value"], settings
    return found


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = value[0] if len(value) == 1 else {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
