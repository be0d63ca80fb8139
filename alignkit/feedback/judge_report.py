"""The report on a judge: order consistency, a preference for a place or for length, ties, abstentions, calibration.

A judge is also held against comparisons whose answer is known: any file of them, or Anthropic's 438 HHH comparisons as
published. Nothing of that becomes a row.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from alignkit.data import DataReport, Rejects, read_rows
from alignkit.data.files import read_file
from alignkit.data.load import read_published
from alignkit.feedback.cache import Asker, key_of
from alignkit.feedback.constitution import COMPARISON_FRAME
from alignkit.feedback.judge import Judge, Label, Pairing, judge_all
from alignkit.feedback.prompts import conversation
from alignkit.recipe.schema import DataSource
from alignkit.recipe.stage import Stage

_SAME_PLACE = 0.95  # share of verdicts for one place from which a judge is said not to read
_ENOUGH = 20  # verdicts, to say anything of the kind
_LITTLE_MASS = 0.1
_BINS = 10
_ANSWER = "\n\nAssistant: "
_HHH_KEYS = {"prompt", "corrects", "incorrects", "text_correct", "text_incorrect"}


def wilson(successes: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927, JASA 22, 209-212); successes may be halves, for ties."""
    if not count:
        return 0.0, 1.0
    share, shrink = successes / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # With no success, or nothing else, the border is 0 or 1; rounding may miss it by an ulp.
    return max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0)


def describe_labels(labels: Sequence[Label]) -> dict[str, Any]:
    """Describe what a judge said: how often it decides, whether both orders agree, what it leans to."""
    done = [label for label in labels if label.p_first is not None]
    decisions = [decision for label in labels for decision in label.decisions if decision is not None]
    answered = [decision.p_first for decision in decisions if decision.p_first is not None]
    longer = [  # whether the longer answer is preferred; 1/2 is no bias of the whole
        (difference > 0) == (label.p_first > 0.5)
        for label in done
        if (difference := label.length_difference) and label.p_first is not None and not label.is_tie
    ]
    return {
        "comparisons": len(labels), "labelled": len(done), "abstained": len(labels) - len(done),
        "abstained_because": count_problems(labels), "ties": sum(label.is_tie for label in done),
        "mean_confidence": mean([abs(label.p_first - 0.5) * 2 for label in done if label.p_first is not None]),
        "order_agreement": _share(_agreeing(labels)),
        "picks_first_place": _share([p > 0.5 for p in answered if p != 0.5]),
        "mean_p_first_place": mean(answered),
        "option_mass": mean([decision.mass for decision in decisions if decision.mass is not None]),
        "length_bias": _share(longer),
        "principles": {
            name: {"n": len(own), "order_agreement": mean(_agreeing(own))}
            for name in sorted({label.principle for label in labels})
            for own in [[label for label in labels if label.principle == name]]
        },
    }  # fmt: skip


def count_problems(labels: Sequence[Label]) -> dict[str, int]:
    """Count the ten most frequent reasons of abstentions; questions that are too long are one, however long."""
    problems = (label.problem or "" for label in labels if label.p_first is None)
    same = (re.sub(r"has \d+ tokens; (\d+) fit", r"has more than the \1 tokens that fit", text) for text in problems)
    return dict(Counter(same).most_common(10))


def find_faults(report: Mapping[str, Any]) -> list[str]:
    """List what a person should know of a judge before using its labels."""
    faults = []
    place, mass = report["picks_first_place"], report["option_mass"]
    if place and place["n"] >= _ENOUGH and not 1 - _SAME_PLACE <= place["share"] <= _SAME_PLACE:
        which = "first" if place["share"] > 0.5 else "second"
        share = max(place["share"], 1 - place["share"])
        faults.append(f"the judge picks the {which} place in {share:.0%} of {place['n']} verdicts: it does not compare")
    elif (agreement := report["order_agreement"]) and agreement["n"] >= _ENOUGH and agreement["low"] <= 0.5:
        share = agreement["share"]
        what = f"both orders prefer the same answer in {share:.0%} of {agreement['n']} comparisons"
        faults.append(f"{what}, no more than by chance")
    if mass is not None and mass < _LITTLE_MASS:
        faults.append(f"(A) and (B) have {mass:.1%} of the judge's probability: it does not answer in this format")
    if report["comparisons"] and report["abstained"] > report["comparisons"] / 5:
        faults.append(f"the judge abstained from {report['abstained']} of {report['comparisons']} comparisons")
    return faults


def _agreeing(labels: Sequence[Label]) -> list[bool]:
    return [label.agrees for label in labels if label.agrees is not None]


def _share(values: Sequence[bool]) -> dict[str, Any] | None:
    """A share with its number and interval, None of nothing."""
    if not values:
        return None
    low, high = wilson(sum(values), len(values))
    return {"share": sum(values) / len(values), "n": len(values), "low": low, "high": high}


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def read_labelled(stage: Stage, sources: Sequence[DataSource], rejects: Rejects) -> list[Pairing]:
    """Read comparisons of which the first answer is the better one; an unsure label (1/2) is left out.

    Raises DataError with file and line.
    """
    found: list[Pairing] = []
    for source in sources:
        path = Path(source.path)
        rows = read_file(path) if path.suffix == ".jsonl" and path.is_file() else iter(())
        if next((row.keys() >= _HHH_KEYS for _, row in rows if isinstance(row, dict)), False):
            skip = stage.options.on_bad_row == "skip"
            published = read_published(path, _read_comparison, "HHH comparison", skip=skip, rejects=rejects)
            found += [replace(pairing, place=place) for place, pairing in islice(published, source.max_rows)]
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


def _read_comparison(data: Mapping[str, Any]) -> Pairing:
    """Read one of Anthropic's HHH comparisons, with its own question."""
    prompt, _, better = data["text_correct"].rpartition(_ANSWER)
    other, _, worse = data["text_incorrect"].rpartition(_ANSWER)
    head, found, _ = data["prompt"].partition(COMPARISON_FRAME[1] + "\n (A)")
    if prompt != other or not found or not prompt:
        raise ValueError("its two answers are to different prompts, or it has no question")
    question = head.rpartition("\n")[2]
    return Pairing(conversation(prompt), better, worse, "", key_of(check=data), question)


def measure(asker: Asker, judge: Judge, pairings: Sequence[Pairing]) -> dict[str, Any]:
    """Ask about comparisons whose first answer is the better one, in both orders, and describe the judge's accuracy."""
    return describe_accuracy(judge_all(asker, replace(judge, orders="both", bounds=(0.0, 1.0)), pairings, by="check"))


def describe_accuracy(labels: Sequence[Label]) -> dict[str, Any]:
    """Accuracy with its 95 % interval (a tie counts as half right), calibration and order consistency."""
    values = [label.p_first for label in labels if label.p_first is not None]
    right = sum(_tie_as_half(value - 0.5) for value in values)
    low, high = wilson(right, len(values))
    bins = _bin(values)
    gaps = sum(one["n"] * abs(one["confidence"] - one["accuracy"]) for one in bins)
    return {
        "n": len(labels), "abstained": len(labels) - len(values), "abstained_because": count_problems(labels),
        "accuracy": right / len(values) if values else None, "low": low, "high": high,
        "longer_is_better": mean([_tie_as_half(label.length_difference) for label in labels]),
        "order_agreement": mean(_agreeing(labels)), "ece": gaps / len(values) if values else None, "bins": bins,
    }  # fmt: skip


def _tie_as_half(difference: float) -> float:
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0


def _bin(values: Sequence[float]) -> list[dict[str, float]]:
    """Bins of equal width of the judge's confidence, from 1/2 to 1 (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    found = []
    for number in range(_BINS):
        low, high = 0.5 + number / (2 * _BINS), 0.5 + (number + 1) / (2 * _BINS)
        own = [p for p in values if low <= max(p, 1 - p) < high or (high == 1.0 and max(p, 1 - p) == 1.0)]
        if own:
            confidence = sum(max(p, 1 - p) for p in own) / len(own)
            accuracy = sum(_tie_as_half(p - 0.5) for p in own) / len(own)
            found.append({"low": low, "high": high, "n": len(own), "confidence": confidence, "accuracy": accuracy})
    return found
