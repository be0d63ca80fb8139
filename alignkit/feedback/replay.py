"""What others have published, instead of asking anybody: chains of critiques and revisions, and labels.

Chains: `samples_*_SLMADISON.jsonl` of Anthropic's Constitutional AI paper. Labels: any file of comparisons that the
data room reads, such as an earlier label stage's rows.jsonl. It asks no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.data import DataReport, Rejects, Text, read_rows
from alignkit.data.files import display_name
from alignkit.data.rows import Message
from alignkit.errors import DataError, Problem
from alignkit.feedback.cache import key_of
from alignkit.feedback.prompts import conversation, read_text
from alignkit.recipe.schema import DataSource
from alignkit.recipe.stage import Stage

_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class PublishedChain:
    """A prompt, its first answer, and the revisions with the names of the principles they were made by."""

    place: str
    prompt: list[Message]
    answer: str
    revisions: tuple[tuple[str, str], ...]  # principle, text


def read_chains(paths: Sequence[str]) -> Iterator[PublishedChain]:
    """Yield the chains of published files.

    Raises DataError with the first problems, each with file and line.
    """
    problems: list[Problem] = []
    for path in paths:
        label = display_name(Path(path))
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot be read: {error}", where=label) from None
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                yield _read_chain(json.loads(line), f"{label}:{number}")
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                what = "is no published chain {rl_prompt, initial_response, cst: [{cst_key, critique, revision}]}"
                problems.append(Problem(f"{what} ({type(error).__name__}: {error})", f"{label}:{number}"))
                if len(problems) >= _SHOWN_PROBLEMS:
                    raise DataError(problems) from None
    if problems:
        raise DataError(problems)


def _read_chain(data: Any, place: str) -> PublishedChain:
    revisions = tuple((str(step["cst_key"]), step["revision"]["sample"].strip()) for step in data["cst"])
    if not revisions:
        raise ValueError("no revisions")
    return PublishedChain(
        place, conversation(data["rl_prompt"]), data["initial_response"][0]["sample"].strip(), revisions
    )


class PublishedLabels:
    """Labels of comparisons, found by their texts."""

    def __init__(self, stage: Stage, path: str) -> None:
        """Read a file of comparisons; raises DataError as the data room does."""
        rows = read_rows(stage, [DataSource(path=path)], report=DataReport(), rejects=Rejects(), method="rm")
        self._labels: dict[str, float] = {}
        for row in rows:
            if row.kind == "pair":
                label = 1.0 if row.label is None else row.label
                first, second = row.completions
                self._labels[pair_key(row.prompt, first, second)] = label
                self._labels[pair_key(row.prompt, second, first)] = 1.0 - label

    def find(self, prompt: Text, first: Text, second: Text) -> float | None:
        """Return P(first preferred), None for a comparison that is not in the file."""
        return self._labels.get(pair_key(prompt, first, second))


def pair_key(prompt: Text, first: Text, second: Text) -> str:
    """Return a key of a comparison's texts, the same for messages and for plain text."""
    turns = [(turn["role"], turn["content"].strip()) for turn in conversation(prompt)]
    return key_of(turns=turns, first=read_text(first).strip(), second=read_text(second).strip())
