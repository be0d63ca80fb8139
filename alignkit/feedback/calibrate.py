"""A judge held against comparisons whose answer is known: how often it is right, and whether it knows when.

Such a set is any file of comparisons, or Anthropic's 438 HHH comparisons as published. Nothing of it becomes a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignkit.data import DataReport, Rejects, read_rows
from alignkit.data.files import display_name
from alignkit.errors import DataError
from alignkit.feedback.comparisons import Judge, Label, Pairing, judge_all
from alignkit.feedback.desk import Desk
from alignkit.feedback.measures import count_problems, wilson
from alignkit.feedback.prompts import conversation, read_text
from alignkit.feedback.published import COMPARISON_FRAME
from alignkit.feedback.store import key_of
from alignkit.recipe.schema import DataSource
from alignkit.recipe.stage import Stage

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
            found += list(_read_published(path))[: source.max_rows]
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


def measure(desk: Desk, judge: Judge, pairings: Sequence[Pairing]) -> dict[str, Any]:
    """Return accuracy with its 95 % interval, calibration and order consistency; both orders of each are asked."""
    labels = judge_all(desk, replace(judge, orders="both", bounds=(0.0, 1.0)), pairings, by="check")
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
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return False
    return isinstance(first, dict) and first.keys() >= _HHH_KEYS


def _read_published(path: Path) -> Iterator[Pairing]:
    """Yield Anthropic's HHH comparisons, each with its own question."""
    label = display_name(path)
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            prompt, _, better = data["text_correct"].rpartition(_ANSWER)
            other, _, worse = data["text_incorrect"].rpartition(_ANSWER)
            head, found, _ = data["prompt"].partition(COMPARISON_FRAME[1] + "\n (A)")
            if prompt != other or not found or not prompt:
                raise ValueError("its two answers are to different prompts, or it has no question")
            question = head.rpartition("\n")[2]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"is no HHH comparison: {error}", where=f"{label}:{number}") from None
        key = key_of(check=line)
        yield Pairing(conversation(prompt), better, worse, f"{label}:{number}", key, question)
