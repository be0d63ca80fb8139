"""The evaluation table: each figure of eval.json with its interval drawn, on one scale for all rows of a metric.

It computes no metric and draws unknown ones like the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from alignkit.report.charts import Line, draw_lines
from alignkit.report.facts import Facts
from alignkit.report.numbers import figure, share
from alignkit.report.samples import text_of

_BAR_WIDTH, _BAR_HEIGHT = 160, 18
_NAMES = {
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "reward_accuracy": "Pair accuracy",
    "implicit_reward_accuracy": "Pair accuracy, implicit reward",
    "pair_accuracy_longer": "Baseline: longer is better",
    "pair_accuracy_shorter": "Baseline: shorter is better",
    "calibration_error": "Calibration error (ECE)",
    "kl": "KL to the reference",
    "true_reward": "True reward",
    "response_length": "Length of answers",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "win_rate": "Win rate",
    "win_rate_length_controlled": "Win rate, length controlled",
    "best_of_n": "Best of N",
    "best_of_n_true_reward": "Best of N, true reward",
    "best_of_n_kl": "KL of the best of N",
    "reference_reward": "Reward of the reference, over the answers of the optimum",
    "optimum_reward": "Reward of the optimum",
    "optimum_kl": "KL of the optimum",
    "ended_share": "Answers that end",
    "judge_accuracy": "Judge: right",
    "order_agreement": "Judge: both orders agree",
    "picks_first_place": "Judge: picks the first place",
    "length_bias": "Judge: picks the longer answer",
    "agreement_between_principles": "Judge: two principles agree",
    "judge_agreement": "Agreement of the judge with itself, orders swapped",
    "judge_abstained": "Abstentions of the judge",
    "completion_logp": "Log-probability of the right answer",
    "likelihood_accuracy": "Few-shot, by likelihood per token",
    "likelihood_accuracy_sum": "Few-shot, by likelihood of the whole",
    "likelihood_accuracy_relative": "Few-shot, by likelihood relative to no question",
    "exact_match": "Few-shot, exact match",
}
_COIN_TOSS = frozenset({"reward_accuracy", "implicit_reward_accuracy", "pair_accuracy_longer", "pair_accuracy_shorter",
                        "win_rate", "win_rate_length_controlled",
                        "judge_accuracy", "picks_first_place", "length_bias"})  # fmt: skip

# What differs from run to run of a sweep; "kl" is that of best-of-N.
_OF_THE_RUN = frozenset({"beta", "reference", "against", "kl"})


@dataclass(frozen=True)
class Row:
    """One figure: texts, and the drawing of its interval. `run` is empty on the page of one run."""

    name: str
    better: str
    slice: str
    run: str
    value: str
    exact: str  # every digit
    interval: str
    n: str
    unit: str
    data: str
    settings: str
    bar: Markup
    first: bool  # of its metric
    says_data: bool = True  # whether `data` is not that of the row above


def tabulate(runs: Sequence[Facts]) -> list[Row]:
    """Return the rows of all runs, those of one metric together and slices below their whole.

    Several runs are compared by the whole; its slices stand on the page of each.
    """
    found = [(run, result) for run in runs for result in run.evaluation.get("results", [])]
    if len(runs) > 1:
        whole = {(run.name, _group(result)) for run, result in found if result.get("slice") is None}
        found = [
            (run, result)
            for run, result in found
            if result.get("slice") is None or (run.name, _group(result)) not in whole
        ]
    names: dict[int, str] = {}
    for run in runs:
        own = run.evaluation.get("results", [])
        names |= {id(result): name for result, name in zip(own, name_all_data(own), strict=True)}
    order = list(dict.fromkeys(_group(result) for _, result in found))
    rows = []
    for group in order:
        members = [(run, result) for run, result in found if _group(result) == group]
        members.sort(key=lambda pair: pair[1].get("slice") is not None)
        scale = _scale([result for _, result in members])
        above = ""
        for number, (run, result) in enumerate(members):
            data = names[id(result)]
            row = _row(result, run.name if len(runs) > 1 else "", scale, data=data, first=number == 0)
            rows.append(replace(row, says_data=data != above))
            above = data
    return rows


def draw_calibration(run: Facts) -> Markup:
    """Return accuracy against confidence of the bins behind a calibration error; empty without them."""
    for result in run.evaluation.get("results", []):
        bins = [
            (float(each["confidence"]), float(each["accuracy"]))
            for each in result.get("details") or []
            if isinstance(each, dict) and _is_number(each.get("confidence")) and _is_number(each.get("accuracy"))
        ]
        if result.get("metric") == "calibration_error" and len(bins) > 1:
            low = min(x for x, _ in bins)
            lines = [Line("measured", bins, dots=True), Line("perfect", [(low, low), (1.0, 1.0)])]
            return draw_lines(lines, title="Calibration", x_label="confidence")
    return Markup("")


@dataclass(frozen=True)
class Examples:
    """A few cases behind a figure, as a table of texts."""

    name: str
    columns: list[str]
    rows: list[list[str]]
    title: str = ""  # what the table is; without one, cases behind the figure of that name


def list_examples(run: Facts) -> list[Examples]:
    """Return the single cases that figures were made from, where eval.json keeps some; bins of a curve are none."""
    found = []
    for result in run.evaluation.get("results", []):
        cases = [case for case in result.get("details") or [] if isinstance(case, dict) and "answer" in case]
        if cases:
            columns = list(dict.fromkeys(key for case in cases for key in case))
            rows = [[_say(case.get(column)) for column in columns] for case in cases]
            metric = str(result.get("metric"))
            found.append(Examples(_NAMES.get(metric, metric), columns, rows))
    return found


def _say(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return figure(value, 3) if isinstance(value, int | float) else text_of(value)


def _group(result: dict[str, Any]) -> tuple[str, ...]:
    """Return what rows share that are compared with each other: all that does not belong to the run itself."""
    settings = {key: value for key, value in (result.get("settings") or {}).items() if key not in _OF_THE_RUN}
    return str(result.get("metric")), str(result.get("data")), str(settings)


def _row(result: dict[str, Any], run: str, scale: tuple[float, float], *, data: str, first: bool) -> Row:
    metric = str(result.get("metric"))
    show = share if result.get("unit") == "share" else _three_digits
    value, low, high = (_as_number(result.get(key)) for key in ("value", "low", "high"))
    n = result.get("n")
    better = {"higher": "\u2191", "lower": "\u2193"}.get(str(result.get("better")), "")
    return Row(
        name=_NAMES.get(metric, metric.replace("reward/", "Reward by ") if metric.startswith("reward/") else metric),
        better=better,
        slice=str(result.get("slice") or ""),
        run=run,
        value=show(value),
        exact="" if value is None else repr(value),
        interval="" if low is None or high is None else f"{show(low)} to {show(high)}",
        n=figure(n) if isinstance(n, int | float) else "",
        unit={"share": "", "x 100": "\u00d7 100"}.get(str(result.get("unit") or ""), str(result.get("unit") or "")),
        data=data,
        settings=", ".join(f"{key}: {item}" for key, item in (result.get("settings") or {}).items()),
        bar=_draw_bar(value, low, high, scale, mark=0.5 if metric in _COIN_TOSS else None),
        first=first,
    )


def name_all_data(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return for each result of one model what it was evaluated on.

    Where the same figure was measured twice, what differs in the settings is named too.
    """
    names = [_name_data(result) for result in results]
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, (result, name) in enumerate(zip(results, names, strict=True)):
        alike.setdefault((result.get("metric"), result.get("slice"), name), []).append(place)
    for places in alike.values():
        settings = [results[place].get("settings") or {} for place in places]
        keys = list(dict.fromkeys(key for each in settings for key in each))
        differing = [key for key in keys if len({repr(each.get(key)) for each in settings}) > 1]
        for place, each in zip(places, settings, strict=True):
            names[place] += "".join(f", {key} {each[key]}" for key in differing if key in each)
    return names


def _name_data(result: Mapping[str, Any]) -> str:
    """Return what was evaluated on, and against which other run."""
    settings, data = result.get("settings") or {}, str(result.get("data") or "")
    if against := settings.get("against"):
        data += f", against {Path(str(against)).name}"
    return f"{data}, judged by {Path(str(settings['judge'])).name}" if settings.get("judge") else data


def _three_digits(value: float | None) -> str:
    return figure(value, 3)


def _scale(results: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the ends of the axis that all rows of one metric share."""
    if all(result.get("unit") == "share" for result in results):
        return 0.0, 1.0
    values = [_as_number(result.get(key)) for result in results for key in ("value", "low", "high")]
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    return min(low * 1.15, 0.0), max(high * 1.15, 0.0) or 1.0


def _draw_bar(
    value: float | None, low: float | None, high: float | None, scale: tuple[float, float], *, mark: float | None
) -> Markup:
    """Return the interval as a line, the value as a dot, zero (or a coin toss) as a tick."""
    if value is None or not 0 < scale[1] - scale[0] < math.inf:
        return Markup("")

    def x(number: float) -> float:
        return round(5 + (number - scale[0]) / (scale[1] - scale[0]) * (_BAR_WIDTH - 10), 1)

    middle = _BAR_HEIGHT / 2
    parts = [Markup('<line class="axis" x1="5" x2="{}" y1="{y}" y2="{y}"/>').format(_BAR_WIDTH - 5, y=middle)]
    zero = mark if mark is not None else (0.0 if scale[0] <= 0 <= scale[1] else None)
    if zero is not None:
        parts.append(Markup('<line class="mark" x1="{x}" x2="{x}" y1="2" y2="{}"/>').format(_BAR_HEIGHT - 2, x=x(zero)))
    if low is not None and high is not None:
        parts.append(Markup('<line class="span" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(x(low), x(high), y=middle))
    parts.append(Markup('<circle class="dot c1" cx="{}" cy="{}" r="3.6"/>').format(x(value), middle))
    return Markup('<svg class="bar" viewBox="0 0 {} {}" aria-hidden="true">{}</svg>').format(
        _BAR_WIDTH, _BAR_HEIGHT, Markup("").join(parts)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _as_number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None
