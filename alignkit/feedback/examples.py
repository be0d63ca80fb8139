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

from alignkit.data.files import display_name
from alignkit.data.rows import Message
from alignkit.errors import Problem, RecipeError
from alignkit.feedback.constitution import CRITIQUE_FRAME, REVISION_FRAME, load_json
from alignkit.recipe.nearest import suggest
from alignkit.recipe.yaml import Node, Origin, parse_yaml

BUILTIN, NONE = "builtin", "none"
PRINCIPLE_HERE = "{}"  # in a published chain of thought: where the question goes
_SHIPPED = Path(__file__).with_name("examples.yaml")
_LABEL = re.compile(r"\n\n(Human|Assistant|CritiqueRequest|Critique|RevisionRequest|Revision):")
_NEXT = "\n\nHuman:"  # most published examples end with the start of the next one
_CRITIQUE = re.compile(r"\n\nCritiqueRequest:.*?\n\nCritique:.*?(?=\n\nRevisionRequest:)", re.DOTALL)
_CRITIQUE_KEYS = ("human", "assistant", "critique_request", "critique", "revision_request", "revision")
_COMPARISON_KEYS = ("human", "better", "worse")


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
    def critique_text(self) -> str:
        return "".join(self.critiques)

    @cached_property
    def critique_messages(self) -> tuple[Message, ...]:
        return tuple(message for text in self.critiques for message in messages_of(text))

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.blake2b(repr((self.critiques, self.pairs, self.thoughts)).encode(), digest_size=16).hexdigest()


def load_examples(values: str | Sequence[str]) -> Examples:
    """Read worked examples: builtin, none, or one or more files.

    Raises RecipeError with every problem found.
    """
    names = [values] if isinstance(values, str) else list(values)
    problems: list[Problem] = []
    found: list[Examples] = []
    for name in names:
        if name == NONE:
            continue
        path = _SHIPPED if name == BUILTIN else Path(name).expanduser()
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
    """Return the examples of revisions with what was said between answer and revision left out."""
    return Examples(tuple(_CRITIQUE.sub("", text) for text in examples.critiques), examples.pairs, examples.thoughts)


def messages_of(transcript: str) -> list[Message]:
    """Return a transcript as messages: what the model is to write are assistant turns, all else user turns."""
    pieces = _LABEL.split(transcript)[1:]
    return [
        Message(role="assistant" if label in ("Assistant", "Critique", "Revision") else "user", content=said.strip())
        for label, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _read(path: Path) -> Examples:
    label = display_name(path)
    if not path.is_file():
        near = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
        hint = suggest(path.name, near) or "; give builtin, none, or a YAML or JSON file"
        raise RecipeError(f"the examples are not there{hint}", where=label)
    text = path.read_text(encoding="utf-8", errors="replace")
    return _read_published(text, label) if path.suffix == ".json" else _read_own(text, label, path.parent)


def _read_published(text: str, label: str) -> Examples:
    """Read a published file of examples: transcripts, pairs, or chains of thought."""
    data = load_json(text, label)
    if not isinstance(data, list) or not data:
        raise RecipeError("holds no list of examples; instructions belong under constitution:", where=label)
    critiques, pairs, thoughts, problems = [], [], [], []
    for number, item in enumerate(data):
        prompt = item.get("prompt") if isinstance(item, dict) else None
        if isinstance(item, str) and "\n\nRevision:" in item:
            critiques.append("\n\n" + item.removesuffix(_NEXT).strip("\n"))
        elif isinstance(prompt, str) and PRINCIPLE_HERE in prompt:
            thoughts.append("\n\n" + prompt.strip("\n"))
        elif isinstance(prompt, str) and _is_pair(item):
            human = prompt.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
            pairs.append(Pair(human, item["corrects"][0], item["incorrects"][0]))
        else:
            problems.append(Problem(f"entry {number} is neither a critique with a revision nor a comparison", label))
    if problems:
        raise RecipeError(problems)
    return Examples(tuple(critiques), tuple(pairs), tuple(thoughts))


def _is_pair(item: dict[str, Any]) -> bool:
    answers = (item.get("corrects"), item.get("incorrects"))
    return all(isinstance(texts, list) and texts and isinstance(texts[0], str) for texts in answers)


def _read_own(text: str, label: str, folder: Path) -> Examples:
    tree = parse_yaml(text, Origin(label, folder))
    known = {"critiques": _CRITIQUE_KEYS, "comparisons": _COMPARISON_KEYS}
    if tree is None or not isinstance(tree.value, dict) or not tree.value:
        raise RecipeError("examples are a mapping with `critiques:` or `comparisons:`", where=f"{label}:1")
    problems: list[Problem] = []
    for key, node in tree.value.items():
        if key not in known:
            what = f"unknown key {key}; it has critiques and comparisons{suggest(key, known)}"
            problems.append(Problem(what, node.place))
            continue
        for item in node.value if isinstance(node.value, list) else [node]:
            problems += _check_item(item, known[key])
    if problems:
        raise RecipeError(problems)
    plain = tree.plain()
    return Examples(
        tuple(_transcribe({key: item[key].strip() for key in _CRITIQUE_KEYS}) for item in plain.get("critiques") or ()),
        tuple(Pair(*(item[key].strip() for key in _COMPARISON_KEYS)) for item in plain.get("comparisons") or ()),
    )


def _check_item(node: Node, keys: tuple[str, ...]) -> list[Problem]:
    if not isinstance(node.value, dict):
        return [Problem(f"an example is a mapping with {', '.join(keys)}", node.place)]
    wrong = [key for key in node.value if key not in keys]
    found = [Problem(f"unknown key {key}{suggest(key, keys)}", node.value[key].place) for key in wrong]
    for key in keys:
        given = node.value.get(key)
        if given is None or not isinstance(given.value, str) or not given.value.strip():
            found.append(Problem(f"the example has no text for {key}", (given or node).place))
    return found


def _transcribe(item: dict[str, str]) -> str:
    critique = f"{item['critique_request'].join(CRITIQUE_FRAME)} {item['critique']}"
    revision = f"{item['revision_request'].join(REVISION_FRAME)} {item['revision']}"
    return f"\n\nHuman: {item['human']}\n\nAssistant: {item['assistant']}{critique}{revision}"
