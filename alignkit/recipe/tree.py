"""A YAML text as a tree that knows where every value was written.

It accepts the part of YAML 1.2 that a recipe needs and refuses the rest: tags, anchors, aliases, several
documents, repeated keys. It knows no key by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

from alignkit.console import redact
from alignkit.errors import Problem, RecipeError

MAX_DEPTH = 50

# YAML 1.2 core schema, less its octal and hexadecimal forms: 1e-4 is a number, no and 1:30 are text, 010 is ten.
_INTEGER = re.compile(r"[-+]?[0-9]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
# Escapes such as "\0" and "\ud800" bring in what no file name, message or JSON file can hold.
_KEY = re.compile(r"[\s-]*([\w.-]{1,60}):(\s|$)")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a text came from: the name messages use, and the folder its relative paths start at."""

    label: str
    folder: Path

    def place(self, line: int) -> str:
        return self.label if self.label.startswith("--") else f"{self.label}:{line}"


@dataclass(slots=True)
class Node:
    """A value with its place; for an entry of a mapping the line is the key's."""

    value: Any  # str, int, float, bool, None, dict[str, Node] or list[Node]
    origin: Origin
    line: int = 1
    quoted: bool = False
    text: str = ""  # a single value as it was written: 2e-4

    @property
    def place(self) -> str:
        return self.origin.place(self.line)

    def plain(self) -> Any:
        """Return the value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def leaves(self, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Node]]:
        """Yield every node below and including this one with its path of keys and list positions."""
        yield path, self
        if isinstance(self.value, dict):
            children: Iterable[tuple[str, Node]] = self.value.items()
        else:
            children = ((str(i), item) for i, item in enumerate(self.value)) if isinstance(self.value, list) else ()
        for key, child in children:
            yield from child.leaves((*path, key))


def parse_yaml(text: str, origin: Origin) -> Node | None:
    """Return the tree of one YAML document, None when it holds nothing; raises RecipeError with every problem."""
    problems = [
        Problem("a tab indents this line; YAML indents with spaces", origin.place(number))
        for number, line in enumerate(text.splitlines(), 1)
        if "\t" in line[: len(line) - len(line.lstrip())] and line.strip()
    ]
    builder = _Builder(origin, problems)
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            builder.take(event)
    except ReaderError as error:
        line = text.count("\n", 0, error.position or 0) + 1
        problems.append(Problem("a control character; a recipe is plain UTF-8 text", origin.place(line)))
    except MarkedYAMLError as error:
        if not problems:  # a tab also breaks the parser: one message is enough
            what, mark = _explain(error)
            lines = text.rstrip().splitlines()  # the end of the text is not a line to look at
            line = min(mark.line + 1 if mark else 1, len(lines))
            key = _KEY.match(lines[line - 1]) if lines else None
            problems.append(Problem(redact(f"{key[1]}: {what}") if key else what, origin.place(line)))
    except YAMLError as error:
        problems.append(Problem(f"this is not YAML ({type(error).__name__})", origin.place(1)))
    if problems:
        raise RecipeError(problems)
    return builder.root


def read_scalar(text: str) -> Any:
    """Return what a plain (unquoted) scalar means."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def _explain(error: MarkedYAMLError) -> tuple[str, Any]:
    """Say what is wrong and where, from the parser's complaint; the parser knows no causes, only expectations."""
    problem, context = (error.problem or "").strip(), (error.context or "").strip()
    here = error.problem_mark or error.context_mark
    if "stream end" in problem or "end of stream" in problem:
        return "a bracket or quote that opens here is never closed", error.context_mark or here
    if "mapping values are not allowed" in problem:
        return "a `:` that cannot be here; check the indentation, and put text that holds `: ` in quotes", here
    if "<block end>" in problem:
        return "the indentation does not fit the lines above", here
    if "could not find expected ':'" in problem:
        return "a key without `:`", error.context_mark or here
    if "cannot start any token" in problem:
        return f"{problem}; put the text in quotes", here
    return f"this is not YAML: {problem or context}" + (f" ({context})" if context and problem else ""), here


@dataclass(slots=True)
class _Builder:
    """Builds the tree from parser events with its own stack, so that depth is bounded before Python's is."""

    origin: Origin
    problems: list[Problem]
    root: Node | None = None
    stack: list[Node] = field(default_factory=list)
    keys: list[tuple[str, int] | None] = field(default_factory=list)  # the pending key of each open collection
    documents: int = 0

    def take(self, event: Event) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                self._stop("a second document; a recipe is one document", line)
            if event.version or event.tags:
                self._report("a % directive; a recipe needs none", line)
        elif isinstance(event, AliasEvent):
            self._report(f"an alias (*{event.anchor}); share values through `extends:` instead", line)
            self._add(Node(None, self.origin, line), closed=True)
        elif isinstance(event, (MappingEndEvent, SequenceEndEvent)):
            self.stack.pop()
            self.keys.pop()
        elif isinstance(event, NodeEvent):
            self._check_decoration(event, line)
            if isinstance(event, ScalarEvent):
                self._add_scalar(event, line)
            elif isinstance(event, (MappingStartEvent, SequenceStartEvent)):
                self._add(Node({} if isinstance(event, MappingStartEvent) else [], self.origin, line), closed=False)

    def _check_decoration(self, event: Any, line: int) -> None:
        if event.anchor:
            self._report(f"an anchor (&{event.anchor}); share values through `extends:` instead", line)
        if event.tag is not None:
            self._report(f"a tag ({str(event.tag)[:40]}); a recipe is plain data and cannot name types or code", line)

    def _add_scalar(self, event: ScalarEvent, line: int) -> None:
        text = event.value
        if _UNPRINTABLE.search(text):
            self._report("a control character or half a surrogate pair in this text", line)
            text = _UNPRINTABLE.sub("?", text)
        quoted = bool(event.style)
        if self.stack and isinstance(self.stack[-1].value, dict) and self.keys[-1] is None:
            self._open_key(text, line, quoted=quoted)
        else:
            self._add(Node(text if quoted else read_scalar(text), self.origin, line, quoted, text), closed=True)

    def _open_key(self, key: str, line: int, *, quoted: bool) -> None:
        before = self.stack[-1].value.get(key)
        if before is not None:
            self._report(f"{_shorten(key)} is here twice, first in line {before.line}; keep one", line)
        if key == "<<" and not quoted:
            self._report("a merge key (<<); share values through `extends:` instead", line)
        if not key.strip():
            self._report("an empty key", line)
        self.keys[-1] = (key, line)

    def _add(self, node: Node, *, closed: bool) -> None:
        if not self.stack:
            self.root = node
        elif isinstance(self.stack[-1].value, list):
            self.stack[-1].value.append(node)
        elif self.keys[-1] is None:
            self._stop("a list, mapping or alias used as a key; a key is one word", node.line)
        else:
            key, node.line = self.keys[-1]
            self.keys[-1] = None
            self.stack[-1].value.setdefault(key, node)
        if not closed:
            if len(self.stack) >= MAX_DEPTH:
                self._stop(f"nested deeper than {MAX_DEPTH} levels", node.line)
            self.stack.append(node)
            self.keys.append(None)

    def _report(self, what: str, line: int) -> None:
        if len(self.problems) < 100:
            self.problems.append(Problem(what, self.origin.place(line)))

    def _stop(self, what: str, line: int) -> None:
        self._report(what, line)
        raise RecipeError(self.problems)


def _shorten(text: str) -> str:
    text = redact(text)
    return text if len(text) <= 60 else text[:57] + "..."
