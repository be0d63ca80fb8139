"""From answers to comparisons, and from labels to rows of preferences; nobody is asked here.

The preferred answer always stands as chosen, so that a reader who knows nothing of labels learns the right thing too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from alignkit.data import Rejects, Row, Text
from alignkit.errors import DataError
from alignkit.feedback.asking import Reply
from alignkit.feedback.comparisons import Label, Pairing
from alignkit.feedback.prompted import Prompted, make_answer, why_useless
from alignkit.feedback.prompts import conversation, read_text
from alignkit.feedback.replay import pair_key


def pair_given(rows: Sequence[Row]) -> list[Pairing]:
    """Return all pairs of the answers that the rows have."""
    return [
        Pairing(row.prompt, first, second, row.place, pair_key(row.prompt, first, second))
        for row in rows
        for first, second in combinations(row.completions, 2)
        if first != second
    ]


def pair_sampled(
    prompts: Sequence[Prompted], replies: Sequence[Sequence[Reply]], rejects: Rejects, control_tokens: Sequence[str]
) -> list[Pairing]:
    """Return all pairs of the answers sampled for each prompt; equal ones and useless ones are left out and counted."""
    pairings = []
    for prompted, own in zip(prompts, replies, strict=True):
        problems = [why_useless(reply, control_tokens) for reply in own]
        for problem in filter(None, problems):
            rejects.add(prompted.place, problem)
        texts = list(dict.fromkeys(reply.text for reply, what in zip(own, problems, strict=True) if what is None))
        if len(texts) < 2 and not any(problems):
            rejects.add(prompted.place, f"all {len(own)} answers are the same")
        for number, (first, second) in enumerate(combinations(texts, 2)):
            answers = make_answer(prompted.prompt, first), make_answer(prompted.prompt, second)
            pairings.append(Pairing(prompted.prompt, *answers, prompted.place, f"{prompted.key} {number}"))
    return pairings


def make_rows(labels: Sequence[Label], mix: Sequence[Row], *, hard: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for each comparison that was judged, then those made by people; hard ones have no label and no ties.

    Raises DataError when people compared messages and the judge texts: one stage cannot be trained on both.
    """
    messages = any(not isinstance(label.pairing.prompt, str) for label in labels)
    for label in labels:
        if label.p_first is not None and not (hard and label.is_tie):
            yield _make_row(label.pairing.prompt, label.pairing.first, label.pairing.second, label.p_first, hard=hard)
    for row in mix:
        if labels and not messages and row.conversational:
            raise DataError(
                "mix: holds messages, and the judged comparisons are plain text; convert one", where=row.place
            )
        for better, worse, p_first in split_ranking(row):
            prompt: Text = row.prompt
            if messages and isinstance(prompt, str):
                prompt = conversation(prompt)
                better, worse = (make_answer(prompt, read_text(text).strip()) for text in (better, worse))
            if not (hard and p_first == 0.5):
                yield _make_row(prompt, better, worse, p_first, hard=hard)


def split_ranking(row: Row) -> Iterator[tuple[Text, Text, float]]:
    """Yield the comparisons of a row made by people: better, worse, P(better preferred); equal scores are none."""
    if row.scores is None:
        yield row.completions[0], row.completions[1], 1.0 if row.label is None else row.label
        return
    for (better, above), (worse, below) in combinations(zip(row.completions, row.scores, strict=True), 2):
        if above > below:
            yield better, worse, 1.0


def _make_row(prompt: Text, first: Text, second: Text, p_first: float, *, hard: bool) -> dict[str, Any]:
    chosen, rejected = (first, second) if p_first >= 0.5 else (second, first)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return row if hard else row | {"label": max(p_first, 1.0 - p_first)}
