"""The evaluation table: the figures of eval.json and of a judge, all rows of one metric on one scale. And how two runs
differ, in the order in which a difference would explain the next: settings, data, versions, figures."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import RunError
from alignkit.report.charts import Line, Point, describe_chart
from alignkit.report.facts import Facts
from alignkit.report.text import WORDS, figure, share, short_name
from alignkit.runs.directory import RunDir
from alignkit.runs.files import read_json, read_record

NAMES: dict[str, str] = WORDS["metrics"]
_ORDER: list[str] = WORDS["order"]  # what decides comes first, what was always easy to measure last
_COIN_TOSS = frozenset(WORDS["coin_toss"])
_BASELINES = ("pair_accuracy_", "accuracy_")  # of the rows alone, whatever the model
# What differs from run to run of a sweep; "kl" is that of best-of-N.
OF_THE_RUN = frozenset({"beta", "reference", "against", "kl"})


def list_figures(run: Facts) -> list[dict[str, Any]]:
    """List the results of eval.json, then what report.json of a label stage says of its judge in the same form."""
    found, report = list(run.evaluation.get("results", [])), run.feedback
    shares = {"unit": "share", "better": "", "data": "labels"}
    for name in ("order_agreement", "picks_first_place", "length_bias", "agreement_between_principles"):
        if (value := report.get(name)) and value.get("n", 1):
            found.append({**shares, **value, "metric": name, "value": value["share"]})
    check = report.get("check") or {}
    if check.get("accuracy") is not None:
        shares |= {"data": "comparisons with known answers", "n": check["n"] - check["abstained"]}
        of_check = {
            "judge_accuracy": {"low": check.get("low"), "high": check.get("high"), "better": "higher",
                               "value": check["accuracy"]},
            "pair_accuracy_longer": {"value": check["longer_is_better"], "n": check["n"]},
            "order_agreement": {"value": check.get("order_agreement")},
            "calibration_error": {"value": check["ece"], "better": "lower", "details": check.get("bins") or []},
        }  # fmt: skip
        found += [
            {**shares, **each, "metric": metric} for metric, each in of_check.items() if each["value"] is not None
        ]
    return found


def tabulate(runs: Sequence[Facts]) -> list[dict[str, Any]]:
    """List the figures of all runs as texts, one metric's together, slices below their whole, on one scale (`bar`)."""
    several = len(runs) > 1
    groups: dict[tuple[str, ...], list[tuple[Facts, dict[str, Any], str]]] = {}
    for run in runs:
        results = list_figures(run)
        whole = {_group(result) for result in results if result.get("slice") is None}
        for result, data in zip(results, name_all_data(results), strict=True):
            if not several or result.get("slice") is None or _group(result) not in whole:
                groups.setdefault(_group(result), []).append((run, result, data))

    def rank(group: tuple[str, ...]) -> int:
        return _ORDER.index(max((prefix for prefix in _ORDER if group[0].startswith(prefix)), key=len))

    rows = []
    for metric, members in ((group[0], groups[group]) for group in sorted(groups, key=rank)):
        is_common = metric.startswith(_BASELINES) and len({_ends(result) for _, result, _ in members}) == 1
        members = members[:1] if is_common else members
        members.sort(key=lambda member: member[1].get("slice") is not None)
        ends = [_ends(result) for _, result, _ in members]
        known = [value for each in ends for value in each if value is not None]
        left, right = min(min(known, default=0.0) * 1.15, 0.0), max(max(known, default=1.0) * 1.15, 0.0) or 1.0
        if all(result.get("unit") == "share" for _, result, _ in members):
            left, right = 0.0, 1.0
        above: str | None = None
        for run, result, data in members:
            row = _make_row(result, left, right)
            named = "any model" if is_common else run.name
            rows.append(row | {"run": named if several else "", "data": data, "first": above is None,
                               "says_data": data != above})  # fmt: skip
            above = data
    return rows


def _group(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Name what rows share that are compared with each other: all that does not belong to the run itself."""
    settings = {key: value for key, value in (result.get("settings") or {}).items() if key not in OF_THE_RUN}
    return str(result.get("metric")), str(result.get("data")), str(settings)


def _make_row(result: Mapping[str, Any], left: float, right: float) -> dict[str, Any]:
    """Write a result as texts; `left` and `right` are the ends of the axis that all rows of its metric share."""
    metric, unit, n = str(result.get("metric")), str(result.get("unit") or ""), result.get("n")
    value, low, high = _ends(result)

    def show(number: float | None) -> str:
        return share(number) if unit == "share" else figure(number, 3)

    def show_ends(low: float | None, high: float | None) -> str:
        """Show an interval; one of no width says nothing."""
        return "" if low is None or high is None or low == high else f"{show(low)} to {show(high)}"

    change, moved = result.get("change") or {}, ""
    by, *ends = _ends(change)
    if by is not None:
        moved = ", ".join(filter(None, [f"{'+' if by > 0 else ''}{show(by)}", show_ends(*ends)]))
    bar: dict[str, float] = {}
    if value is not None and 0 < right - left < math.inf:
        mark = 0.5 if metric in _COIN_TOSS else 0.0
        places = {"value": value, "mark": mark if left <= mark <= right else None}
        places |= {"low": low, "high": high} if low != high else {}
        bar = {name: round(100 * (at - left) / (right - left), 1) for name, at in places.items() if at is not None}
    return {
        "name": NAMES.get(metric, f"Reward by {metric[7:]}" if metric.startswith("reward/") else metric),
        "better": {"higher": "\u2191", "lower": "\u2193"}.get(str(result.get("better")), ""),
        "slice": str(result.get("slice") or ""), "value": show(value), "bar": bar,
        "exact": "" if value is None else repr(value),
        "interval": show_ends(low, high), "change": moved, "n": figure(n) if isinstance(n, int | float) else "",
        "than": f"paired difference to {short_name(str(change.get('start', '')))}" if moved else "",
        "unit": {"share": "", "x 100": "\u00d7 100"}.get(unit, unit),
        "settings": ", ".join(f"{key}: {item}" for key, item in (result.get("settings") or {}).items()),
    }  # fmt: skip


def _ends(result: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    value, low, high = (_number(result.get(key)) for key in ("value", "low", "high"))
    return value, low, high


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def name_all_data(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name what each result of one model was evaluated on, with the settings in which equal figures differ."""
    names = []
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, result in enumerate(results):
        settings, name = result.get("settings") or {}, str(result.get("data") or "")
        for key, words in (("against", ", against "), ("judge", ", judged by "), ("reference", ", from ")):
            is_said = settings.get(key) and (key != "reference" or result.get("metric") == "kl")
            name += f"{words}{short_name(str(settings[key]))}" if is_said else ""
        if trained := result.get("trained"):
            name += f", {trained['rows']} of {trained['of']} prompts trained on"
        names.append(name)
        alike.setdefault((result.get("metric"), result.get("slice"), name), []).append(place)
    for places in alike.values():
        every = [results[place].get("settings") or {} for place in places]
        keys = list(dict.fromkeys(key for each in every for key in each))
        differing = [key for key in keys if len({repr(each.get(key)) for each in every}) > 1]
        for place, each in zip(places, every, strict=True):
            names[place] += "".join(f", {key} {each[key]}" for key in differing if key in each)
    return names


def draw_calibration(run: Facts) -> dict[str, Any] | None:
    """Draw accuracy against confidence of the bins behind a calibration error, with how many pairs each has."""
    for result in list_figures(run):
        is_error = result.get("metric") == "calibration_error"
        bins = [each for each in (result.get("details") if is_error else None) or () if isinstance(each, dict)]
        points = [
            Point(x, y, label=f"{figure(each['n'])} pairs" if "n" in each else "")
            for each in bins
            if (x := _number(each.get("confidence"))) is not None and (y := _number(each.get("accuracy"))) is not None
        ]
        if len(points) > 1:
            low = min(point.x for point in points)
            lines = [Line("measured", points, style="dots"), Line("perfect", [(low, low), (1.0, 1.0)])]
            counts = ", ".join(figure(each["n"]) for each in bins if each.get("n"))
            note = "accuracy of the pairs in each bin of confidence"
            note += f"; pairs, from the left: {counts}" if counts else ""
            return describe_chart(lines, "Calibration", note, x_label="confidence")
    return None


# How two runs differ.

_DATA = ("rows", "fingerprint", "kinds", "duplicates", "rejected", "overlap")
_RESULT = ("status", "step", "tokens", "wall_seconds", "tokens_per_second", "peak_memory_bytes")
_PATHS = ("output_dir", "logging_dir", "run_name", "hub_model_id")  # of TRL's configuration: where it writes
_SHOWN = 60

Pairs = dict[str, tuple[Any, Any]]  # key -> the values of both runs, None where a run has none


@dataclass(frozen=True)
class Difference:
    """What differs between two runs."""

    runs: tuple[str, str]
    settings: Pairs
    data: Pairs
    versions: Pairs
    metrics: Pairs  # all of them, equal ones too

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
    metrics: Pairs = {}  # like beside like: figures of other methods, rows or settings stand apart, with what differs
    figures, others = _list_metrics(RunDir(first), one), _list_metrics(RunDir(second), other)
    for name in dict.fromkeys([*figures, *others]):
        (a, of_a), (b, of_b) = figures.get(name, (None, None)), others.get(name, (None, None))
        if of_a is None or of_b is None or of_a == of_b:
            metrics[name] = (a, b)
            continue
        keys = [key for key in {**of_a, **of_b} if of_a.get(key) != of_b.get(key)]
        apart = [f"{name}, {', '.join(f'{key} {of.get(key)}' for key in keys)}" for of in (of_a, of_b)]
        metrics |= {apart[0]: (a, None), apart[1]: (None, b)}
    return Difference(
        (names[0], names[1]),
        {key: pair for key, pair in settings.items() if not key.startswith("trl.") or key in of_both},
        _pair(_list_data(one), _list_data(other)), _pair(*versions), metrics,
    )  # fmt: skip


def _pair(first: Mapping[str, Any], second: Mapping[str, Any]) -> Pairs:
    pairs = {key: (first.get(key), second.get(key)) for key in dict.fromkeys([*first, *second])}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


def _settings(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Collect every value in force, dotted: `stage.` are the recipe's values, `trl.` what they leave to TRL."""
    kept = {key: stage.get(key) for key in ("method", "seed", "start_dir", "model", "lora", "launch", "reward_stages")}
    values = {**(stage.get("options") or {}), **(stage.get("trainer") or {})}
    values.pop("method", None)
    trl = {f"trl.{key}": value for key, value in (stage.get("trl") or {}).items() if key not in (*values, *_PATHS)}
    return _flatten({**kept, "stage": values}) | trl


def _list_data(stage: Mapping[str, Any]) -> dict[str, Any]:
    reports, prints = stage.get("data") or {}, stage.get("fingerprint") or {}
    parts = {"train": reports} if "fingerprint" in reports else reports
    found: dict[str, Any] = {part: {key: report[key] for key in _DATA if key in report}
                             for part, report in parts.items() if isinstance(report, dict)}  # fmt: skip
    found |= {key: prints[key] for key in prints if "." not in key and key not in ("seed", "start", "method")}
    return _flatten(found)


def _list_metrics(run: RunDir, stage: Mapping[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Collect what came out, each with what must be equal for it to be compared."""
    result, method = read_json(run.result) if run.result.is_file() else {}, {"method": stage.get("method")}
    num_held_out = (stage.get("eval_lengths") or {}).get("num_rows")
    rows = [num_held_out, (stage.get("options") or {}).get("eval"), _list_data(stage).get("data")]
    found: dict[str, tuple[Any, dict[str, Any]]] = {key: (result.get(key), {}) for key in _RESULT if result}
    for key, value in (result.get("metrics") or {}).items():
        if key.startswith("eval_") and num_held_out:
            found[f"{key} on {num_held_out} held-out rows"] = value, {**method, "held out": rows}
        else:
            found[key] = value, method
    results = read_record(run.evaluation).get("results", [])
    for each, data in zip(results, name_all_data(results), strict=True):
        part = str(each.get("slice") or "")
        if not part.startswith(("margin", "chosen", "equal")):  # those are cut by the run's own rows
            settings = {key: value for key, value in (each.get("settings") or {}).items() if key not in OF_THE_RUN}
            found[f"{each['metric']}{f', {part}' if part else ''} on {data}"] = each["value"], settings
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
