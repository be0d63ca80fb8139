"""Constitutions: principles to criticise, revise and compare by, from our YAML or the JSON that Anthropic published.

Every mistake in a file is found at once, with its line. Published files (arXiv 2212.08073):
https://github.com/anthropics/ConstitutionalHarmlessnessPaper; the words around an instruction are taken off, and
`prompts` puts them back, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from alignkit.data.files import display_name
from alignkit.errors import Problem, RecipeError
from alignkit.recipe.nearest import suggest
from alignkit.recipe.yaml import Node, Origin, parse_yaml

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


CRITIQUE_FRAME = ("\n\nCritiqueRequest: ", "\n\nCritique:")
REVISION_FRAME = ("\n\nRevisionRequest: ", "\n\nRevision:")
COMPARISON_FRAME = ("\n", " Options:")


def read_published(text: str, label: str) -> list[Principle]:
    """Return the principles of one published file; each has a critique and a revision, or a comparison.

    Raises RecipeError for JSON of another shape.
    """
    data = load_json(text, label)
    if isinstance(data, dict):
        return _refuse_none(list(_read_instructions(data, label)), label)
    if isinstance(data, list) and all(isinstance(item, str) for item in data):
        questions = [unframe(item, COMPARISON_FRAME, f"entry {number}", label) for number, item in enumerate(data)]
        found = [Principle(f"comparison{number}", comparison=question) for number, question in enumerate(questions)]
        return _refuse_none(found, label)
    what = "holds examples, not instructions; name it under examples:" if isinstance(data, list) else "holds no object"
    raise RecipeError(what, where=label)


def load_json(text: str, label: str) -> Any:
    """Return the value in a JSON text; raises RecipeError with the line."""
    try:
        return json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise RecipeError(f"is not JSON: {getattr(error, 'msg', error)}", where=f"{label}:{line}") from None


def unframe(text: str, frame: tuple[str, str], name: str, label: str) -> str:
    """Take a text out of its frame; raises RecipeError where the text is not framed so."""
    start, end = frame
    if not (text.startswith(start) and text.endswith(end) and text[len(start) : -len(end)].strip()):
        raise RecipeError(f"{name} is not {start!r} + an instruction + {end!r}", where=label)
    return text[len(start) : -len(end)]


def _read_instructions(data: dict[str, Any], label: str) -> Iterator[Principle]:
    problems = []
    for name, item in data.items():
        prompts = item.get("prompt") if isinstance(item, dict) else None
        request = item.get("edit_request") if isinstance(item, dict) else None
        if not isinstance(prompts, list) or not prompts or not isinstance(request, str):
            problems.append(Problem(f"{name}: must be {{prompt: [TEXT], edit_request: TEXT}}", label))
            continue
        for number, prompt in enumerate(prompts):
            try:
                critique = unframe(str(prompt), CRITIQUE_FRAME, f"{name}.prompt", label)
                revision = unframe(request, REVISION_FRAME, f"{name}.edit_request", label)
            except RecipeError as error:
                problems += error.problems
                continue
            yield Principle(name if number == 0 else f"{name}.{number}", critique=critique, revision=revision)
    if problems:
        raise RecipeError(problems)


def _refuse_none(found: list[Principle], label: str) -> list[Principle]:
    if not found:
        raise RecipeError("there are no principles in it", where=label)
    return found


BUILTIN = "builtin:"
Part = Literal["critique", "comparison"]
_SHIPPED = Path(__file__).with_name("constitutions")
_2_64 = float(2**64)
_MISSING = {
    "critique": "no principle has a critique request and a revision request; add critique: and revision: to each, or "
    "leave the stage out (critique: false)",
    "comparison": "no principle has a question to compare answers by; add comparison: to each",
}


@dataclass(frozen=True)
class Constitution:
    """Principles in the order of their files; all of them have what the stage asks for."""

    principles: tuple[Principle, ...]

    def draw(self, *, seed: int, key: str, turn: int) -> Principle:
        """Return the principle for one turn of whatever `key` names, by weight.

        It depends on nothing else: neither the order of the work nor a restart changes it (CAI, arXiv 2212.08073,
        section 3.1: a principle is drawn at every step, uniformly where the weights are equal).
        """
        digest = hashlib.blake2b(f"principle {seed} {turn} {key}".encode(), digest_size=8).digest()
        drawn = int.from_bytes(digest, "little") / _2_64 * self._borders[-1]
        return self.principles[min(bisect_right(self._borders, drawn), len(self.principles) - 1)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash, in hex, of everything that can change a draw or a prompt."""
        text = json.dumps([asdict(principle) for principle in self.principles])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def _borders(self) -> list[float]:
        return list(accumulate(principle.weight for principle in self.principles))


def load_constitution(values: str | Sequence[str], *, needs: Part | None = None) -> Constitution:
    """Read one or more constitutions into one; each value is a file or builtin:NAME.

    `needs` leaves only the principles that can be criticised, or compared, by: the published files hold either kind.
    Raises RecipeError with every problem found, each with file and line.
    """
    problems: list[Problem] = []
    found: list[Principle] = []
    places: dict[str, str] = {}
    names = [values] if isinstance(values, str) else list(values)
    for value in names:
        try:
            read = _read(value)
        except RecipeError as error:
            problems += error.problems
            continue
        for principle in read:
            if principle.name in places:
                what = f"the principle {principle.name} is also in {places[principle.name]}; rename one"
                problems.append(Problem(what, _display(value)))
            places[principle.name] = _display(value)
        found += read
    if problems:
        raise RecipeError(problems)
    kept = tuple(principle for principle in found if needs is None or getattr(principle, needs) is not None)
    if not kept:
        raise RecipeError(_MISSING[needs or "comparison"], where=", ".join(map(_display, names)))
    return Constitution(kept)


def _find(value: str) -> Path:
    """Return the file a value names; raises RecipeError for a builtin constitution that is not there."""
    if not value.startswith(BUILTIN):
        return Path(value).expanduser()
    name = value.removeprefix(BUILTIN)
    known = sorted(path.stem for path in _SHIPPED.glob("*.yaml"))
    if name not in known:
        names = " and ".join(f"{BUILTIN}{other}" for other in known)
        raise RecipeError(f"constitution is {value}; there are {names}{suggest(name, known)}")
    return _SHIPPED / f"{name}.yaml"


def _display(value: str) -> str:
    return value if value.startswith(BUILTIN) else display_name(_find(value))


def _read(value: str) -> list[Principle]:
    path = _find(value)
    label = display_name(path)
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*") if other.suffix in (".yaml", ".yml", ".json"))
        hint = suggest(path.name, near) or "; give a YAML or JSON file, builtin:harmlessness or builtin:helpfulness"
        raise RecipeError(f"the constitution is not there{hint}", where=label)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the constitution cannot be read: {error}", where=label) from None
    return read_published(text, label) if path.suffix == ".json" else read_principles(text, label, path.parent)
