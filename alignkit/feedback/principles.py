"""Principles as our YAML writes them, every mistake found at once with its line.

It knows neither the published JSON (`published`) nor how a principle is drawn (`constitution`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import Problem, RecipeError
from alignkit.recipe.nearest import suggest
from alignkit.recipe.tree import Node, Origin, parse_yaml

_TOP = ("name", "description", "principles")
_TEXTS = ("critique", "revision", "comparison")
_KEYS = ("name", *_TEXTS, "weight", "tags")
_OPTIONS = "Options:"  # the prompt adds it


@dataclass(frozen=True)
class Principle:
    """One thing to go by. `critique` and `revision` come together; `comparison` is a question about two answers."""

    name: str
    critique: str | None = None
    revision: str | None = None
    comparison: str | None = None
    weight: float = 1.0
    tags: tuple[str, ...] = ()


def read_principles(text: str, label: str, folder: Path) -> list[Principle]:
    """Return the principles of a YAML text; `label` is its name in messages.

    Raises RecipeError with all problems.
    """
    tree = parse_yaml(text, Origin(label, folder))
    if tree is None or not isinstance(tree.value, dict):
        raise RecipeError("a constitution is a mapping with a list of `principles:`", where=f"{label}:1")
    problems = [
        Problem(f"{key} is no key of a constitution; it has {', '.join(_TOP)}{suggest(key, _TOP)}", node.place)
        for key, node in tree.value.items()
        if key not in _TOP
    ]
    listed = tree.value.get("principles")
    if listed is None or not isinstance(listed.value, list) or not listed.value:
        place = listed.place if listed is not None else tree.place
        what = "there are no principles; write `principles:` with a list of {name, critique, revision, comparison}"
        raise RecipeError([*problems, Problem(what, place)])
    for number, node in enumerate(listed.value, 1):
        problems += _check(node, f"principle {number}")
    problems += _check_names(listed.value)
    if problems:
        raise RecipeError(problems)
    problems += _check_parts(listed.value)
    if problems:
        raise RecipeError(problems)
    return [_make({key: child.plain() for key, child in node.value.items()}) for node in listed.value]


def _make(values: dict[str, Any]) -> Principle:
    texts = {key: " ".join(values[key].split()) for key in _TEXTS if values.get(key) is not None}
    if "comparison" in texts:
        texts["comparison"] = texts["comparison"].removesuffix(_OPTIONS).rstrip()
    return Principle(
        name=values["name"],
        weight=float(values.get("weight", 1.0)),
        tags=tuple(values.get("tags") or ()),
        **texts,
    )


def _check(node: Node, name: str) -> Iterator[Problem]:
    """Yield what is wrong with one principle by itself."""
    if not isinstance(node.value, dict):
        yield Problem(f"{name} is {_show(node)}; it must be a mapping with {', '.join(_KEYS)}", node.place)
        return
    given = node.value.get("name")
    if given is None:
        yield Problem(f"{name} has no name; add a short one, for the report", node.place)
    elif not isinstance(given.value, str) or not given.value.strip():
        yield Problem(f"{name}.name is {_show(given)}; it must be a text", given.place)
    else:
        name = f"principle {given.value}"
    for key, child in node.value.items():
        if key not in _KEYS:
            yield Problem(f"{name}: unknown key {key}; it has {', '.join(_KEYS)}{suggest(key, _KEYS)}", child.place)
        elif key in _TEXTS and (not isinstance(child.value, str) or not child.value.strip()):
            yield Problem(f"{name}: {key} is {_show(child)}; it must be a text", child.place)
        elif key == "weight" and not _is_weight(child.value):
            yield Problem(f"{name}: weight is {_show(child)}; it must be a number greater than 0", child.place)
        elif key == "tags" and not _is_texts(child):
            yield Problem(f"{name}: tags is {_show(child)}; it must be a list of words", child.place)
    if ("critique" in node.value) != ("revision" in node.value):
        there, missing = ("critique", "revision") if "critique" in node.value else ("revision", "critique")
        yield Problem(f"{name} has a {there} but no {missing}; the two go together", node.place)
    elif "critique" not in node.value and "comparison" not in node.value:
        what = f"{name} has no question; add comparison: (for labels), or critique: and revision:"
        yield Problem(what, node.place)


def _check_names(nodes: list[Node]) -> Iterator[Problem]:
    seen: dict[Any, int] = {}
    for node in nodes:
        given = node.value.get("name") if isinstance(node.value, dict) else None
        if given is None or not isinstance(given.value, str):
            continue
        if given.value in seen:
            first = seen[given.value]
            yield Problem(f"the name {given.value} is here twice, first in line {first}; rename one", given.place)
        seen.setdefault(given.value, given.line)


def _check_parts(nodes: list[Node]) -> Iterator[Problem]:
    """Yield the principles that lack what others in the file have: they would never be drawn, and nobody would know."""
    for part, what in (("comparison", "question; add comparison:"), ("critique", "critique: and revision:; add them")):
        having = [node for node in nodes if part in node.value]
        if having and len(having) < len(nodes):
            for node in nodes:
                if part not in node.value:
                    name = node.value["name"].value
                    yield Problem(f"principle {name} has no {what} (the other principles have them)", node.place)


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_texts(node: Node) -> bool:
    return isinstance(node.value, list) and all(isinstance(item.value, str) and item.value for item in node.value)


def _show(node: Node) -> str:
    value = node.value
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or value == "":
        return "empty"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
