"""What report.json of a critique or label stage says, as figures of the evaluation table and tables of cases.

It computes nothing: the feedback room has, and wrote it down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from alignkit.report.evaluation import Examples
from alignkit.report.facts import Facts
from alignkit.report.numbers import figure, share
from alignkit.report.samples import text_of

_SHARES = ("order_agreement", "picks_first_place", "length_bias")
_LABELS = "labels"


def with_feedback(run: Facts) -> Facts:
    """Return the run with what its report.json measures of a judge among the figures of its evaluation."""
    found = list(_list_figures(run.feedback))
    if not found:
        return run
    return replace(run, evaluation={**run.evaluation, "results": [*run.evaluation.get("results", []), *found]})


def list_costs(run: Facts) -> list[tuple[str, str]]:
    """Return what the texts and labels took beside time and tokens."""
    report = run.feedback
    spent = [each for each in (report.get("spent"), report.get("spent_on_answers")) if each]
    retries = sum(sum((each.get("retries") or {}).values()) for each in spent)
    pairs = [
        ("labels per second", figure(report["labels_per_second"], 3) if report.get("labels_per_second") else ""),
        ("requests to servers", figure(sum(each.get("requests", 0) for each in spent)) if spent else ""),
        ("of them tried again", figure(retries) if spent else ""),
        ("price of the tokens", figure(sum(each.get("cost") or 0.0 for each in spent)) if _has_price(spent) else ""),
    ]
    return [(label, text) for label, text in pairs if text]


def list_counts(run: Facts) -> list[tuple[str, str]]:
    """Return how many texts or comparisons there are, and what became of them."""
    report = run.feedback
    named = {
        "prompts": "prompts", "rows": "rows written", "rows_by_people": "of them compared by people",
        "helpful_rows": "of them helpful answers", "broken_chains": "chains that broke off",
        "comparisons": "comparisons", "abstained": "the judge abstained from", "ties": "ties",
        "quoted": "texts defused, which looked like a template",
    }  # fmt: skip
    pairs = [(label, figure(report[key])) for key, label in named.items() if report.get(key)]
    pairs += [(f"abstained: {reason}", figure(number)) for reason, number in _reasons(report)]
    pairs += [
        (label, share(report[key]))
        for key, label in (("option_mass", "probability on (A) and (B)"), ("cut_off_share", "texts cut off"))
        if report.get(key) is not None
    ]
    return pairs


def list_cases(run: Facts) -> list[Examples]:
    """Return some labels with their texts, the principles with how the judge did on each, the rounds of revisions."""
    return [
        each
        for each in (_labels(run), _chains(run.feedback), _principles(run.feedback), _rounds(run.feedback))
        if each.rows
    ]


def _list_figures(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name in _SHARES:
        if value := report.get(name):
            yield _figure(name, value["share"], value, data=_LABELS)
    between = report.get("agreement_between_principles") or {}
    if between.get("n"):
        yield _figure("agreement_between_principles", between["share"], between, data=_LABELS)
    check = report.get("check") or {}
    if check.get("accuracy") is not None:
        known, answered = "comparisons with known answers", {"n": check["n"] - check["abstained"]}
        yield _figure("judge_accuracy", check["accuracy"], check | answered, data=known, better="higher")
        yield _figure("pair_accuracy_longer", check["longer_is_better"], {"n": check["n"]}, data=known)
        if check.get("order_agreement") is not None:
            yield _figure("order_agreement", check["order_agreement"], answered, data=known)
        ece = _figure("calibration_error", check["ece"], answered, data=known, better="lower")
        yield ece | {"details": check.get("bins") or []}


def _figure(metric: str, value: float, found: Mapping[str, Any], *, data: str, better: str = "") -> dict[str, Any]:
    """Return a figure in the form of eval.json."""
    ends = {key: found.get(key) for key in ("low", "high", "n")}
    return {"metric": metric, "value": value, **ends, "unit": "share", "better": better, "data": data}


def _labels(run: Facts) -> Examples:
    columns = ["prompt", "first", "second", "P(first)", "each order", "principle"]
    rows = [
        [
            *(text_of(label.get(key)) for key in ("prompt", "first", "second")),
            "abstained" if label.get("p_first") is None else figure(label["p_first"], 3),
            ", ".join("–" if value is None else figure(value, 3) for value in label.get("orders") or []),
            str(label.get("principle", "")),
        ]
        for label in run.labels
    ]
    return Examples("labels", columns, rows, title=f"The first {len(rows)} comparisons and what the judge said")


def _chains(report: Mapping[str, Any]) -> Examples:
    """Return the first answer of each chain and every revision below it, with the critique that led to it, if any."""
    rows = []
    for chain in report.get("first_chains") or []:
        critiques = chain.get("critiques") or [""] * len(chain["principles"])
        steps = zip(["", *chain["principles"]], ["", *critiques], chain["answers"], strict=False)
        rows += [
            ["" if number else text_of(chain["prompt"]), principle, critique, answer]
            for number, (principle, critique, answer) in enumerate(steps)
        ]
    columns = ["prompt", "principle", "critique", "answer, then its revisions"]
    return Examples("chains", columns, rows, title="The first answers, criticised and revised")


def _principles(report: Mapping[str, Any]) -> Examples:
    """Return a row for each principle; a critique stage only counts them."""
    found = report.get("principles") or {}
    counted = {name: value if isinstance(value, dict) else {"n": value} for name, value in found.items()}
    with_orders = any("order_agreement" in value for value in counted.values())
    rows = [
        [name, figure(value.get("n")), *([share(value.get("order_agreement"))] if with_orders else [])]
        for name, value in counted.items()
    ]
    columns = ["principle", "n", *(["both orders agree"] if with_orders else [])]
    return Examples("principles", columns, rows, title=f"{len(rows)} principles, as they were drawn")


def _rounds(report: Mapping[str, Any]) -> Examples:
    rows = [
        [figure(each.get("round")), figure(each.get("texts")), figure(each.get("mean_chars"), 3),
         share(each["changed_share"]) if "changed_share" in each else "–"]
        for each in report.get("rounds") or []
    ]  # fmt: skip
    return Examples("rounds", ["round", "texts", "mean characters", "changed"], rows, title="Answers, round by round")


def _reasons(report: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    yield from (report.get("abstained_because") or {}).items()
    yield from ((report.get("check") or {}).get("abstained_because") or {}).items()


def _has_price(spent: list[dict[str, Any]]) -> bool:
    return any(each.get("cost") is not None for each in spent)
