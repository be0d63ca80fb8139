"""The same prompts before, during and after training, side by side, with what rewards said of each answer.

It arranges the rows of samples.jsonl; it scores nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from alignkit.report.facts import Facts
from alignkit.report.numbers import figure

_NOT_REWARDS = frozenset({"step", "when", "number", "prompt", "answer", "reference", "answers", "rewards"})
_EMPTY_LINES = re.compile(r"^(?:[^\S\n]*\n){4,}", re.MULTILINE)


@dataclass(frozen=True)
class Score:
    """A reward by name, and whether it rose, fell or stayed since the first sample of the same prompt."""

    name: str
    value: str
    change: str = ""  # "up", "down" or ""
    difference: str = ""


@dataclass(frozen=True)
class Answer:
    """What the model wrote at one time."""

    when: str
    step: str
    text: str
    scores: list[Score]


@dataclass(frozen=True)
class Ranked:
    """One of the given answers of a reward model's row, with its reward at each time."""

    text: str
    scores: list[Score]


@dataclass(frozen=True)
class Sample:
    """One prompt: turns of (role, text), then what was answered, or what a reward model thought of given answers."""

    prompt: list[tuple[str, str]]
    answers: list[Answer]
    ranked: list[Ranked]
    times: list[str]
    reference: str


def arrange_samples(run: Facts) -> list[Sample]:
    """Return the samples of a run, one per prompt, each in the order of its steps."""
    by_number: dict[Any, list[dict[str, Any]]] = {}
    for row in run.samples:
        by_number.setdefault(row.get("number"), []).append(row)
    return [_arrange(sorted(rows, key=lambda row: row.get("step", 0))) for rows in by_number.values()]


def _arrange(rows: list[dict[str, Any]]) -> Sample:
    first = rows[0]
    is_ranked = "answers" in first
    return Sample(
        prompt=turns(first.get("prompt")),
        answers=[] if is_ranked else [_answer(row, first) for row in rows],
        ranked=_rank(rows) if is_ranked else [],
        times=[f"{row.get('when', '')}, step {figure(row.get('step', 0))}" for row in rows],
        reference=text_of(first["reference"]) if first.get("reference") else "",
    )


def _answer(row: dict[str, Any], first: dict[str, Any]) -> Answer:
    names = [name for name, value in row.items() if name not in _NOT_REWARDS and isinstance(value, int | float)]
    scores = [_score(name, row[name], first.get(name) if row is not first else None) for name in names]
    return Answer(str(row.get("when", "")), figure(row.get("step", 0)), fold(text_of(row.get("answer"))), scores)


def _rank(rows: list[dict[str, Any]]) -> list[Ranked]:
    first = rows[0]
    found = []
    for place, answer in enumerate(first["answers"]):
        rewards = [row["rewards"][place] for row in rows]
        scores = [_score("", reward, rewards[0] if number else None) for number, reward in enumerate(rewards)]
        found.append(Ranked(text_of(answer), scores))
    return found


def _score(name: str, value: Any, before: Any) -> Score:
    if not isinstance(value, int | float):
        return Score(name, str(value))
    shown = figure(float(value), 3)
    if not isinstance(before, int | float):
        return Score(name, shown)
    difference = float(value) - float(before)
    change = "up" if difference > 1e-9 else "down" if difference < -1e-9 else ""
    return Score(name, shown, change, figure(abs(difference), 3))


def turns(prompt: Any) -> list[tuple[str, str]]:
    """Return a prompt as turns of role and text; a plain text has one turn without a role."""
    if isinstance(prompt, list):
        return [(str(turn.get("role", "")), text_of(turn)) for turn in prompt if isinstance(turn, dict)]
    return [("", text_of(prompt))] if prompt else []


def fold(text: str) -> str:
    """Return a text with each long run of empty lines, as untrained models write them, in one line that counts them."""
    return _EMPTY_LINES.sub(lambda found: f"[{found[0].count(chr(10))} empty lines]\n", text)


def text_of(content: Any) -> str:
    """Return the text of an answer: itself, a message, or messages one below the other."""
    if isinstance(content, dict):
        return text_of(content.get("content"))
    if isinstance(content, list):
        return "\n".join(text_of(item.get("text") if item.get("type") == "text" else item) for item in content)
    return "" if content is None else str(content)
