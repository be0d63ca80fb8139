"""What labels say of their judge: order consistency, a preference for a place or for length, ties and abstentions.

Deliberately pure: labels in, numbers out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from alignkit.feedback.comparisons import Label
from alignkit.feedback.prompts import read_text

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
    verdicts = [verdict for label in labels for verdict in label.verdicts if verdict is not None]
    answered = [verdict.p_first for verdict in verdicts if verdict.p_first is not None]
    masses = [verdict.mass for verdict in verdicts if verdict.mass is not None]
    return {
        "comparisons": len(labels),
        "labelled": len(done),
        "abstained": len(labels) - len(done),
        "abstained_because": count_problems(labels),
        "ties": sum(label.is_tie for label in done),
        "mean_confidence": _mean([abs(label.p_first - 0.5) * 2 for label in done if label.p_first is not None]),
        "order_agreement": _share(both),
        "picks_first_place": _share([p > 0.5 for p in answered if p != 0.5]),
        "mean_p_first_place": _mean(answered),
        "option_mass": _mean(masses),
        "length_bias": _length_bias(done),
        "principles": _by_principle(labels),
    }


def count_problems(labels: Sequence[Label]) -> dict[str, int]:
    """Return the ten most frequent reasons of abstentions; questions that are too long are one, however long."""
    problems = (label.problem or "" for label in labels if label.p_first is None)
    same = (re.sub(r"has \d+ tokens; (\d+) fit", r"has more than the \1 tokens that fit", text) for text in problems)
    return dict(Counter(same).most_common(10))


def find_faults(report: dict[str, Any]) -> list[str]:
    """Return what a person should know of a judge before using its labels; empty for one without such faults."""
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


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
