"""Worked examples that stand before a request: critiques with revisions, comparisons, chains of thought.

They come from our own YAML or from the published JSON files; each kind goes where it belongs. They are trusted: nothing
in them is quoted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alignkit.data.rows import Message
from alignkit.errors import Problem, RecipeError
from alignkit.feedback.constitution import CRITIQUE_FRAME, REVISION_FRAME, Written, load_json, read_yaml
from alignkit.recipe.nearest import suggest
from alignkit.recipe.schema import Text
from alignkit.recipe.yaml import label_path

BUILTIN, NONE = "builtin", "none"
PRINCIPLE_HERE = "{}"  # in a published chain of thought: where the question goes
_LABEL = re.compile(r"\n\n(Human|Assistant|CritiqueRequest|Critique|RevisionRequest|Revision):")
_NEXT = "\n\nHuman:"  # most published examples end with the start of the next one
_CRITIQUE = re.compile(r"\n\nCritiqueRequest:.*?\n\nCritique:.*?(?=\n\nRevisionRequest:)", re.DOTALL)


class _Critique(Written):
    human: Text
    assistant: Text
    critique_request: Text
    critique: Text
    revision_request: Text
    revision: Text


class _Comparison(Written):
    human: Text
    better: Text
    worse: Text


class _File(Written):
    critiques: list[_Critique] = []
    comparisons: list[_Comparison] = []


@dataclass(frozen=True)
class Pair:
    """An answer that is better and one that is worse; the question they are compared by is drawn."""

    prompt: str
    better: str
    worse: str


@dataclass(frozen=True)
class Examples:
    """Worked examples by kind; transcripts start with a blank line and end with their last word."""

    critiques: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    thoughts: tuple[str, ...] = ()

    @cached_property
    def critique_messages(self) -> tuple[Message, ...]:
        return tuple(message for text in self.critiques for message in messages_of(text))

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.blake2b(repr((self.critiques, self.pairs, self.thoughts)).encode(), digest_size=16).hexdigest()


def load_examples(values: str | Sequence[str]) -> Examples:
    """Read worked examples: builtin, none, or one or more files; raises RecipeError with every problem found."""
    problems: list[Problem] = []
    found: list[Examples] = []
    for name in [values] if isinstance(values, str) else values:
        if name == NONE:
            continue
        path = Path(__file__).with_name("examples.yaml") if name == BUILTIN else Path(name).expanduser()
        try:
            found.append(_read(path))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return Examples(
        tuple(text for part in found for text in part.critiques),
        tuple(pair for part in found for pair in part.pairs),
        tuple(text for part in found for text in part.thoughts),
    )


def without_critiques(examples: Examples) -> Examples:
    """Leave out what was said between an answer and its revision."""
    return Examples(tuple(_CRITIQUE.sub("", text) for text in examples.critiques), examples.pairs, examples.thoughts)


def messages_of(transcript: str) -> list[Message]:
    """Turn a transcript into messages: what the model is to write are assistant turns, all else user turns."""
    pieces = _LABEL.split(transcript)[1:]
    return [
        Message(role="assistant" if label in ("Assistant", "Critique", "Revision") else "user", content=said.strip())
        for label, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _read(path: Path) -> Examples:
    label = label_path(path)
    if not path.is_file():
        near = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
        hint = suggest(path.name, near) or "; give builtin, none, or a YAML or JSON file"
        raise RecipeError(f"the examples are not there{hint}", where=label)
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".json":
        return _read_published(load_json(text, label), label)
    file, _, problems = read_yaml(_File, text, label, path.parent, "examples")
    if problems or file is None:
        raise RecipeError(problems)
    critiques = []
    for item in file.critiques:
        critique = f"{item.critique_request.strip().join(CRITIQUE_FRAME)} {item.critique.strip()}"
        revision = f"{item.revision_request.strip().join(REVISION_FRAME)} {item.revision.strip()}"
        critiques.append(f"\n\nHuman: {item.human.strip()}\n\nAssistant: {item.assistant.strip()}{critique}{revision}")
    pairs = [Pair(item.human.strip(), item.better.strip(), item.worse.strip()) for item in file.comparisons]
    return Examples(tuple(critiques), tuple(pairs))


def _read_published(data: Any, label: str) -> Examples:
    """Read a published file of examples: transcripts, pairs, or chains of thought."""
    if not isinstance(data, list) or not data:
        raise RecipeError("holds no list of examples; instructions belong under constitution:", where=label)
    critiques, pairs, thoughts, problems = [], [], [], []
    for number, item in enumerate(data):
        prompt = item.get("prompt") if isinstance(item, dict) else None
        if isinstance(item, str) and "\n\nRevision:" in item:
            critiques.append("\n\n" + item.removesuffix(_NEXT).strip("\n"))
        elif isinstance(prompt, str) and PRINCIPLE_HERE in prompt:
            thoughts.append("\n\n" + prompt.strip("\n"))
        else:
            try:
                human = str(prompt).removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
                pair = _Comparison(human=human, better=item["corrects"][0], worse=item["incorrects"][0])
                pairs.append(Pair(pair.human, pair.better, pair.worse))
            except (AttributeError, KeyError, IndexError, TypeError, ValueError):
                what = f"entry {number} is neither a critique with a revision nor a comparison"
                problems.append(Problem(what, label))
    if problems:
        raise RecipeError(problems)
    return Examples(tuple(critiques), tuple(pairs), tuple(thoughts))
