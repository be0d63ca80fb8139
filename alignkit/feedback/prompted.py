"""The prompts of a stage, answers to them, and rows of both: what making any feedback begins and ends with.

It criticises and compares nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.data import Rejects, Row, Text, find_control_tokens
from alignkit.data.hashes import prompt_key
from alignkit.data.rows import Message, take_prompt
from alignkit.errors import DataError
from alignkit.feedback.asking import Job, Model, Reply, Sampling
from alignkit.feedback.desk import Desk, seed_of
from alignkit.feedback.prompts import ask_answer


@dataclass(frozen=True)
class Prompted:
    """A prompt with what tells it from all others of the stage, however often its text occurs."""

    prompt: Text
    place: str
    key: str


def list_prompts(rows: Iterable[Row], rejects: Rejects, control_tokens: Sequence[str]) -> list[Prompted]:
    """Return the prompts of rows; one with a control token in its text is left out, for it would act as one.

    Raises DataError when none is left.
    """
    found: list[Prompted] = []
    seen: Counter[str] = Counter()
    for row in rows:
        try:
            bare = row if row.kind == "prompt" else take_prompt(row)
        except ValueError as error:
            rejects.add(row.place, str(error))
            continue
        if tokens := find_control_tokens(bare, control_tokens):
            rejects.add(row.place, f"prompt: holds the control token {tokens[0]}")
            continue
        digest = hashlib.blake2b(prompt_key(bare), digest_size=16).hexdigest()
        seen[digest] += 1
        found.append(Prompted(bare.prompt, row.place, f"{digest} {seen[digest]}"))
    if not found:
        raise DataError([*rejects.first] or "there are no prompts")
    return found


def sample_answers(
    desk: Desk, model: Model, prompts: Sequence[Prompted], sampling: Sampling, *, count: int, seed: int, kind: str
) -> list[list[Reply]]:
    """Return `count` answers to each prompt."""
    jobs, about = [], []
    for prompted in prompts:
        request = ask_answer(prompted.prompt)
        for number in range(count):
            jobs.append(Job(request, seed_of(seed, kind, number, prompted.key)))
            about.append({"place": prompted.place, "number": number})
    replies = desk.write(model, jobs, sampling, kind=kind, by="generator", about=about)
    return [replies[start : start + count] for start in range(0, len(replies), count)]


def why_useless(reply: Reply, control_tokens: Sequence[str]) -> str | None:
    """Return why an answer can be no row, None when it can: an empty one teaches nothing, a control token would act."""
    if reply.problem is not None:
        return reply.problem
    if not reply.text.strip():
        return "the answer is empty"
    if tokens := find_control_tokens(Row("text", "", (reply.text,)), control_tokens):
        return f"the answer holds the control token {tokens[0]}"
    return None


def make_row(prompt: Text, answer: str) -> dict[str, Any]:
    """Return a row for an sft stage."""
    return {"prompt": prompt, "completion": make_answer(prompt, answer)}


def make_answer(prompt: Text, answer: str) -> Text:
    """Return an answer in the form of its prompt; in a transcript it stands one space after its label."""
    if not isinstance(prompt, str):
        return [Message(role="assistant", content=answer)]
    return f" {answer}" if prompt.startswith("\n\nHuman:") else answer
