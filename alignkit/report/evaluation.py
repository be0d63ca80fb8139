"""The evaluation table: the figures of eval.json and of a judge, all rows of one metric on one scale."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.report.charts import Line, Point, describe_chart
from alignkit.report.facts import Facts
from alignkit.report.text import WORDS, figure, share, short_name

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
        ends = {"low": check.get("low"), "high": check.get("high"), "better": "higher"}
        found += [
            {**shares, **ends, "metric": "judge_accuracy", "value": check["accuracy"]},
            {**shares, "metric": "pair_accuracy_longer", "value": check["longer_is_better"], "n": check["n"]},
        ]
        if check.get("order_agreement") is not None:
            found.append({**shares, "metric": "order_agreement", "value": check["order_agreement"]})
        bins = check.get("bins") or []
        found.append({**shares, "metric": "calibration_error", "value": check["ece"], "better": "lower",
                      "details": bins})  # fmt: skip
    return found


def tabulate(runs: Sequence[Facts]) -> list[dict[str, Any]]:
    """List the figures of all runs as texts, those of one metric together and slices below their whole.

    Several runs are compared by the whole; its slices stand on the page of each. `exact` has every digit of a value,
    `bar` says where value, low, high and a mark stand on the scale of the metric, in percent, `first` is true for the
    first row of a metric, `says_data` where `data` is not that of the row above.
    """
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

    if low == high:  # it says nothing
        low = high = None
    change, moved = result.get("change") or {}, ""
    if (by := _number(change.get("value"))) is not None:
        moved = f"{'+' if by > 0 else ''}{show(by)}"
        ends = [_number(change.get(key)) for key in ("low", "high")]
        if None not in ends and ends[0] != ends[1]:
            moved += f", {show(ends[0])} to {show(ends[1])}"
    bar: dict[str, float] = {}
    if value is not None and 0 < right - left < math.inf:
        mark = 0.5 if metric in _COIN_TOSS else 0.0
        places = {"value": value, "low": low, "high": high, "mark": mark if left <= mark <= right else None}
        bar = {name: round(100 * (at - left) / (right - left), 1) for name, at in places.items() if at is not None}
    return {
        "name": NAMES.get(metric, f"Reward by {metric[7:]}" if metric.startswith("reward/") else metric),
        "better": {"higher": "\u2191", "lower": "\u2193"}.get(str(result.get("better")), ""),
        "slice": str(result.get("slice") or ""), "value": show(value), "bar": bar,
        "exact": "" if value is None else repr(value),
        "interval": "" if low is None or high is None else f"{show(low)} to {show(high)}",
        "n": figure(n) if isinstance(n, int | float) else "", "change": moved,
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
    """Name what each result of one model was evaluated on.

    Where the same figure was measured twice, what differs in the settings is named too.
    """
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
