"""The report on a judge: order consistency, a preference for a place or for length, ties, abstentions, calibration.

A judge is also held against comparisons whose answer is known: any file of them, or Anthropic's 438 HHH comparisons as
published. Nothing of that becomes a row.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from alignkit.data import DataReport, Rejects, read_rows
from alignkit.data.files import read_file, read_published
from alignkit.feedback.cache import Asker, key_of
from alignkit.feedback.constitution import COMPARISON_FRAME
from alignkit.feedback.judge import Judge, Label, Pairing, judge_all
from alignkit.feedback.prompts import conversation, read_text
from alignkit.recipe.schema import DataSource
from alignkit.recipe.stage import Stage

_SAME_PLACE = 0.95  # share of verdicts for one place from which a judge is said not to read
_ENOUGH = 20  # verdicts, to say anything of the kind
_LITTLE_MASS = 0.1


def wilson(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927); successes may be halves, for ties."""
    if not count:
        return 0.0, 1.0
    share = successes / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0)


def describe_labels(labels: Sequence[Label]) -> dict[str, Any]:
    """Return the part of the report that is about the labels."""
    done = [label for label in labels if label.p_first is not None]
    both = [label.agrees for label in labels if label.agrees is not None]
    decisions = [decision for label in labels for decision in label.decisions if decision is not None]
    answered = [decision.p_first for decision in decisions if decision.p_first is not None]
    masses = [decision.mass for decision in decisions if decision.mass is not None]
    return {
        "comparisons": len(labels),
        "labelled": len(done),
        "abstained": len(labels) - len(done),
        "abstained_because": count_problems(labels),
        "ties": sum(label.is_tie for label in done),
        "mean_confidence": mean([abs(label.p_first - 0.5) * 2 for label in done if label.p_first is not None]),
        "order_agreement": _share(both),
        "picks_first_place": _share([p > 0.5 for p in answered if p != 0.5]),
        "mean_p_first_place": mean(answered),
        "option_mass": mean(masses),
        "length_bias": _length_bias(done),
        "principles": _by_principle(labels),
    }


def count_problems(labels: Sequence[Label]) -> dict[str, int]:
    """Return the ten most frequent reasons of abstentions; questions that are too long are one, however long."""
    problems = (label.problem or "" for label in labels if label.p_first is None)
    same = (re.sub(r"has \d+ tokens; (\d+) fit", r"has more than the \1 tokens that fit", text) for text in problems)
    return dict(Counter(same).most_common(10))


def find_faults(report: dict[str, Any]) -> list[str]:
    """List what a person should know of a judge before using its labels."""
    faults = []
    place = report["picks_first_place"]
    if place and place["n"] >= _ENOUGH and not 1 - _SAME_PLACE <= place["share"] <= _SAME_PLACE:
        which = "first" if place["share"] > 0.5 else "second"
        share = max(place["share"], 1 - place["share"])
        faults.append(f"the judge picks the {which} place in {share:.0%} of {place['n']} verdicts: it does not compare")
    elif (agreement := report["order_agreement"]) and agreement["n"] >= _ENOUGH and agreement["low"] <= 0.5:
        faults.append(
            f"both orders prefer the same answer in {agreement['share']:.0%} of {agreement['n']} comparisons, no more "
            "than by chance"
        )
    if report["option_mass"] is not None and report["option_mass"] < _LITTLE_MASS:
        share = report["option_mass"]
        faults.append(f"(A) and (B) have {share:.1%} of the judge's probability: it does not answer in this format")
    if report["comparisons"] and report["abstained"] > report["comparisons"] / 5:
        faults.append(f"the judge abstained from {report['abstained']} of {report['comparisons']} comparisons")
    return faults


def _length_bias(labels: Sequence[Label]) -> dict[str, Any] | None:
    """Return how often the longer answer is preferred; 1/2 is no bias of the whole."""
    longer = []
    for label in labels:
        difference = len(read_text(label.pairing.first)) - len(read_text(label.pairing.second))
        if difference and label.p_first is not None and not label.is_tie:
            longer.append((difference > 0) == (label.p_first > 0.5))
    return _share(longer)


def _by_principle(labels: Sequence[Label]) -> dict[str, dict[str, Any]]:
    names = Counter(label.principle for label in labels)
    found = {}
    for name in sorted(names):
        own = [label for label in labels if label.principle == name]
        agreeing = _share([label.agrees for label in own if label.agrees is not None])
        found[name] = {"n": len(own), "order_agreement": agreeing["share"] if agreeing else None}
    return found


def _share(values: Sequence[bool]) -> dict[str, Any] | None:
    """Return a share with its number and interval, None of nothing."""
    if not values:
        return None
    low, high = wilson(sum(values), len(values))
    return {"share": sum(values) / len(values), "n": len(values), "low": low, "high": high}


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


_BINS = 10
_ANSWER = "\n\nAssistant: "
_HHH_KEYS = {"prompt", "corrects", "incorrects", "text_correct", "text_incorrect"}


def read_labelled(stage: Stage, sources: Sequence[DataSource], rejects: Rejects) -> list[Pairing]:
    """Return comparisons of which the first answer is the better one; an unsure label (1/2) is left out.

    Raises DataError with file and line.
    """
    found: list[Pairing] = []
    for source in sources:
        path = Path(source.path)
        if path.suffix == ".jsonl" and path.is_file() and _is_published(path):
            skip = stage.options.on_bad_row == "skip"
            rows = read_published(path, _read_comparison, "HHH comparison", skip=skip, rejects=rejects)
            found += [replace(pairing, place=place) for place, pairing in islice(rows, source.max_rows)]
            continue
        for row in read_rows(stage, [source], report=DataReport(), rejects=rejects, method="rm"):
            better, worse = row.completions[0], row.completions[-1]
            if row.label == 0.5 or (row.scores and row.scores[0] == row.scores[-1]):
                rejects.add(row.place, "check: neither answer is better")
                continue
            if row.label is not None and row.label < 0.5:
                better, worse = worse, better
            found.append(Pairing(row.prompt, better, worse, row.place, f"check {row.place}"))
    return found


def measure(asker: Asker, judge: Judge, pairings: Sequence[Pairing]) -> dict[str, Any]:
    """Return accuracy with its 95 % interval, calibration and order consistency; both orders of each are asked."""
    labels = judge_all(asker, replace(judge, orders="both", bounds=(0.0, 1.0)), pairings, by="check")
    return describe_accuracy(labels)


def describe_accuracy(labels: Sequence[Label]) -> dict[str, Any]:
    """Return the figures of labels whose first answer is the better one; a tie counts as half right."""
    values = [label.p_first for label in labels if label.p_first is not None]
    right = sum(1.0 if value > 0.5 else 0.5 if value == 0.5 else 0.0 for value in values)
    low, high = wilson(right, len(values))
    agreeing = [label.agrees for label in labels if label.agrees is not None]
    longer = [_longer(label) for label in labels]
    bins = list(_bins(values))
    return {
        "n": len(labels),
        "abstained": len(labels) - len(values),
        "abstained_because": count_problems(labels),
        "accuracy": right / len(values) if values else None,
        "low": low,
        "high": high,
        "longer_is_better": sum(longer) / len(longer) if longer else None,
        "order_agreement": sum(agreeing) / len(agreeing) if agreeing else None,
        "ece": sum(one["n"] * abs(one["confidence"] - one["accuracy"]) for one in bins) / len(values)
        if values
        else None,
        "bins": bins,
    }


def _bins(values: Sequence[float]) -> Iterator[dict[str, float]]:
    """Yield bins of equal width of the judge's confidence, from 1/2 to 1 (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    width = 0.5 / _BINS
    for number in range(_BINS):
        low, high = 0.5 + number * width, 0.5 + (number + 1) * width
        own = [
            value for value in values
            if (low <= max(value, 1 - value) < high) or (number == _BINS - 1 and max(value, 1 - value) == 1.0)
        ]  # fmt: skip
        if own:
            confidence = sum(max(value, 1 - value) for value in own) / len(own)
            right = sum(1.0 if value > 0.5 else 0.5 if value == 0.5 else 0.0 for value in own)
            yield {"low": low, "high": high, "n": len(own), "confidence": confidence, "accuracy": right / len(own)}


def _longer(label: Label) -> float:
    difference = len(read_text(label.pairing.first)) - len(read_text(label.pairing.second))
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0


def _is_published(path: Path) -> bool:
    return next((row.keys() >= _HHH_KEYS for _, row in read_file(path) if isinstance(row, dict)), False)


def _read_comparison(data: Mapping[str, Any]) -> Pairing:
    """Read one of Anthropic's HHH comparisons, with its own question."""
    prompt, _, better = data["text_correct"].rpartition(_ANSWER)
    other, _, worse = data["text_incorrect"].rpartition(_ANSWER)
    head, found, _ = data["prompt"].partition(COMPARISON_FRAME[1] + "\n (A)")
    if prompt != other or not found or not prompt:
        raise ValueError("its two answers are to different prompts, or it has no question")
    question = head.rpartition("\n")[2]
    return Pairing(conversation(prompt), better, worse, "", key_of(check=data), question)
