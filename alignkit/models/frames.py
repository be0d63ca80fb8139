"""What a chat template writes around the contents of turns, learnt once for each sequence of roles.

A conversation of marks is rendered instead of one of contents. A mark notes each question that the template asks of it
("does it start with <think>?"), and refuses those whose answer cannot be noted. Contents of which the same is true are
written around in the same way: their text is put together without rendering anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partialmethod
from itertools import accumulate, chain
from typing import Any, NoReturn

from jinja2 import Environment, nodes

# A mark is the number of its content, and around it what a strip of "\n" takes away and what only a strip of all white
# space does: white space itself, for a strip of the whole text.
_MARK = re.compile("(\x1c?)(\x1d?)\ue000(\\d+)\ue001(\x1e?)(\x1f?)")
_STRIPS = {"lstrip": ("\x1c", "\x1c\x1d"), "rstrip": ("\x1f", "\x1e\x1f"), "strip": ("\x1c\x1f", "\x1c\x1d\x1e\x1f")}


class Inspected(Exception):
    """A template asks more of a content than a mark can answer."""


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise Inspected


class _Joined(str):
    """A text with a mark in it: it can be written and added to, and nothing can be asked of it."""

    def __add__(self, other: str) -> _Joined:
        return _Joined(str.__add__(self, other))

    def __radd__(self, other: str) -> _Joined:
        return _Joined(str.__add__(other, self))

    def __str__(self) -> str:
        return self


class _Mark(_Joined):
    """Stands for a content that is not blank; `asked` notes what was left of it, the question and its answer."""

    asked: list[tuple[str, str, tuple[Any, ...], bool]]

    def __bool__(self) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _ask(self, question: str, *given: Any) -> bool:
        answer = getattr(str, question)(self, *map(_plain, given)) is True
        self.asked.append((str.__str__(self), question, given, answer))
        return answer

    def _strip(self, gone: tuple[str, str], chars: str | None = None, /) -> _Mark:
        if chars not in (None, "\n"):
            raise Inspected
        left = _Mark(str.translate(self, dict.fromkeys(map(ord, gone[chars is None]))))
        left.asked = self.asked
        return left


for _name in set(dir(str)) - set(dir(object)) - vars(_Joined).keys() | {"__hash__"}:
    setattr(_Joined, _name, _refuse)
for _name in ("__contains__", "__eq__", "startswith", "endswith"):
    setattr(_Mark, _name, partialmethod(_Mark._ask, _name))
for _name, _gone in _STRIPS.items():
    setattr(_Mark, _name, partialmethod(_Mark._strip, _gone))


def _plain(value: Any) -> Any:
    """Refuse a mark, and a list that holds one, where a function would read it as a text."""
    if any(isinstance(one, _Joined) for one in (value if isinstance(value, list) else [value])):
        raise Inspected
    return value


def _take(groups: Sequence[str | Any], contents: Sequence[str]) -> str:
    """Take the content that a mark stands for, and cut off what was cut off from the mark."""
    first, second, number, third, fourth = groups
    text = contents[int(number)] if first else contents[int(number)].lstrip("\n" if second else None)
    return text if fourth else text.rstrip("\n" if third else None)


class Frame:
    """The texts that a template writes for one sequence of roles, with places for contents."""

    def __init__(self, written: Sequence[Any], asked: Sequence[tuple[str, str, tuple[Any, ...], bool]]) -> None:
        self.tries = 2  # rows that are still compared with what rendering gives
        self._questions = [(_MARK.findall(mark)[0], *others) for mark, *others in dict.fromkeys(asked)]
        self._texts = []
        for one in written:
            found = list(_MARK.finditer(one.text))
            places = {one.start, *chain.from_iterable(one.spans)}
            if any(mark.start() < place < mark.end() for mark in found for place in places):
                raise Inspected
            sizes = {place: [len(mark[0]) for mark in found if mark.end() <= place] for place in places}
            # Of a place: the characters before it that are no mark's, and how many marks there are.
            fixed = {place: (place - sum(before), len(before)) for place, before in sizes.items()}
            self._texts.append((one, _MARK.split(one.text)[::3], [mark.groups() for mark in found], fixed))

    def fill(self, contents: Sequence[str]) -> list[Any] | None:
        """Put contents into the frame; None where something else is true of them than of those it was learnt with."""
        for groups, question, given, answer in self._questions:
            if getattr(str, question)(_take(groups, contents), *given) != answer:
                return None
        filled = []
        for one, pieces, slots, fixed in self._texts:
            texts = [_take(groups, contents) for groups in slots]
            ends = [0, *accumulate(map(len, texts))]
            at = {place: size + ends[number] for place, (size, number) in fixed.items()}
            whole = pieces.copy()
            whole[1::2] = texts
            filled.append(type(one)("".join(whole), [(at[a], at[b]) for a, b in one.spans], at[one.start], one.plain))
        return filled


def learn_frame(
    write: Callable[[list[Any]], Sequence[Any]], messages: Sequence[Any], environment: Environment
) -> Frame | None:
    """Learn what `write` makes of messages like these, None where it depends on more than marks can tell."""
    asked: list[Any] = []
    marked = []
    for number, message in enumerate(messages):
        mark = _Mark(f"\x1c\x1d\ue000{number}\ue001\x1e\x1f")
        mark.asked = asked
        marked.append({**message, "content": mark})

    def guard(function: Any) -> Callable[..., Any]:
        return lambda *given, **named: function(*map(_plain, given), **named)

    filters = dict(environment.filters)
    environment.filters.update({name: guard(each) for name, each in filters.items() if name not in ("trim", "default")})
    try:
        return Frame(write(marked), asked)
    except Inspected:
        return None
    finally:
        environment.filters.update(filters)


def can_be_learnt(environment: Environment, source: str) -> bool:
    """Whether texts are joined into plain ones, which do not tell of a mark in them, only where they are written."""
    tree = environment.parse(source)
    written = {id(node) for output in tree.find_all(nodes.Output) for node in output.nodes}
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    joined: list[nodes.Node] = [*tree.find_all((nodes.Concat, nodes.AssignBlock, nodes.FilterBlock))]
    joined += [call for call in tree.find_all(nodes.Call) if getattr(call.node, "name", "") in macros]
    joined += [node for node in tree.find_all(nodes.Getattr) if node.attr in ("join", "format", "format_map")]
    joined += [node for node in tree.find_all(nodes.Mod) if isinstance(getattr(node.left, "value", None), str)]
    return all(id(node) in written for node in joined)
