"""The keys under `sweep:` with their values, read from the tree, and everything that may be wrong with them as such.

Whether a value suits its key is checked where every value of that key is; what the values make is in `sweep`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.errors import Problem, RecipeError
from alignkit.recipe.advice import describe_unknown_in_stage
from alignkit.recipe.check import describe_unknown, show, show_key
from alignkit.recipe.fields import method_fields
from alignkit.recipe.nearest import suggest
from alignkit.recipe.overrides import FLAG, lay_value
from alignkit.recipe.rlaif import METHOD as RLAIF
from alignkit.recipe.rlaif import STEPS, stage_name
from alignkit.recipe.schema import LoraOptions, ModelOptions, option_fragments
from alignkit.recipe.sections import Group, StageTree, split_group
from alignkit.recipe.stage import HARMLESS
from alignkit.recipe.tree import Node

KEY = "sweep"
TOP = ("seed", "model", "lora", "data", "eval")  # keys of the top level that stages read
_REFUSED = {
    "name": "it is the directory of all runs",
    "stages": "it is what `alignkit run` runs; sweep keys of those stages",
    "sweep": "a sweep holds no other",
    "evaluate": "it says what is measured, not what is trained; give it to `alignkit eval` as options",
    "launch": "it says where stages run, not what is trained",
    "extends": "it is read before all else; write one recipe for each",
}
_LONGEST_LABEL = 40


@dataclass(frozen=True)
class Axis:
    """One swept key: its path in the tree, its values, and what names and tables call them."""

    path: tuple[str, ...]
    values: tuple[Node, ...]
    labels: tuple[str, ...]
    plain: tuple[Any, ...]  # as written, before paths are resolved
    place: str

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def lay(self, tree: Node, value: Node) -> Node:
        """Return the tree with one of the values in force; raises RecipeError when the key leads nowhere."""
        keys = list(self.path)
        if len(keys) > 2 and keys[1] in STEPS:  # `critique: true` is short for an empty mapping
            step = tree.value[keys[0]].value.get(keys[1])
            if step is not None and step.value is True:
                empty = Node({}, step.origin, step.line)
                tree = lay_value(tree, keys[:2], empty, key=self.key, where=self.place)
        laid = lay_value(tree, keys, value, key=f"{KEY}.{self.key}", where=self.place)
        if keys == ["lora"] and value.value is None:  # no adapters, whether or not the recipe has a lora: section
            laid.value.pop("lora", None)
        return laid


def read_axes(
    tree: Node, stages: Mapping[str, StageTree], groups: Mapping[str, Group]
) -> tuple[list[Axis], list[Problem]]:
    """Return the swept keys in the order in which they are written, and what is wrong with others."""
    node = tree.value.get(KEY)
    if node is None or node.value is None:
        return [], []
    reader = _Reader(tree, stages, groups)
    if not isinstance(node.value, dict):
        reader.report(node, f"{KEY} is {show(node)}; it must be a mapping, such as {{dpo.beta: [0.05, 0.1, 0.5]}}")
        return [], reader.problems
    entries = list(reader.flatten(node, ()))
    off = [path for path, value in entries if value.value is None]
    replaced = [path for path, value in entries if value.place == FLAG]  # dpo.beta or dpo: {beta: ...} in the file
    for path, value in entries:
        gone = value.place != FLAG and path in replaced or any(path[: len(other)] == other for other in off)
        if not gone:
            reader.take(path, value)
    return reader.axes, reader.problems


class _Reader:
    def __init__(self, tree: Node, stages: Mapping[str, StageTree], groups: Mapping[str, Group]) -> None:
        self.axes: list[Axis] = []
        self.problems: list[Problem] = []
        self._tree, self._stages, self._groups = tree, stages, groups

    def report(self, node: Node, what: str) -> None:
        self.problems.append(Problem(what, node.place))

    def flatten(self, node: Node, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Node]]:
        """Yield path and node of each list, and of each null that the command line puts in a list's place."""
        for name, child in node.value.items():
            path = (*above, *name.split("."))
            shown = show_key(".".join((KEY, *path)))
            if not all(path):
                self.report(child, f"{shown} is not a dotted key, such as dpo.beta")
            elif isinstance(child.value, dict):
                yield from self.flatten(child, path)
            elif (isinstance(child.value, list) and child.value) or (child.value is None and child.place == FLAG):
                yield self._find_path(path), child
            elif child.value == []:
                self.report(child, f"{shown} is empty; give at least one value, or take it out")
            else:
                again = f"[{show(child)}]" if child.value is not None else "[0.1, 0.5]"
                self.report(child, f"{shown} is {show(child)}; it must be a list of values, such as {again}")

    def _find_path(self, path: tuple[str, ...]) -> tuple[str, ...]:
        """Return where a key stands in the tree: rlaif-dpo.beta is rlaif.dpo.beta."""
        for group in self._groups:
            for step in STEPS:
                if path[0] == stage_name(group, step) and path[0] not in self._tree.value:
                    return (group, step, *path[1:])
        return path

    def take(self, path: tuple[str, ...], node: Node) -> None:
        """Add a swept key, or report why it cannot be one."""
        axis = Axis(path, tuple(node.value), _label(node.value), tuple(item.plain() for item in node.value), node.place)
        problem = self._describe_key(axis) or self._describe_values(axis) or self._describe_conflict(axis)
        if problem:
            self.report(node, f"{KEY}.{show_key(axis.key)} {problem}")
            return
        if len(path) > 1 and path[0] not in TOP and (unknown := self._describe_unknown(axis)):
            self.report(node, unknown)
            return
        given = _find(self._tree, path)
        if given is not None and given.place == FLAG:
            what = f"{axis.key} is swept, so one value of it has no effect; add `{FLAG} {KEY}.{axis.key}=null`"
            self.problems.append(Problem(what, given.place))
            return
        try:
            changed = [axis.lay(self._tree, value) for value in axis.values]
        except RecipeError as error:
            self.problems += error.problems
            return
        if path[0] in self._groups:
            before = _list_stages(self._tree, path[0])
            if any(_list_stages(tree, path[0]) != before for tree in changed):
                self.report(node, f"{KEY}.{axis.key} {_CHANGES_STAGES}")
                return
        self.axes.append(axis)

    def _describe_key(self, axis: Axis) -> str | None:
        """Say why a key cannot be swept."""
        first, *rest = axis.path
        if first in _REFUSED:
            return f"cannot be swept: {_REFUSED[first]}"
        if first in TOP:
            known = {"model": ModelOptions.model_fields, "lora": LoraOptions.model_fields}.get(first)
            if rest and known is not None and rest[0] not in known:
                return f"leads nowhere: {describe_unknown(rest[0], first, known)}"
            return None
        if first not in self._stages and first not in self._groups:
            names = [name for name, stage in self._stages.items() if stage.group is None]
            hint = suggest(first, [*names, *self._groups, *TOP]) or f"; there are {', '.join([*names, *self._groups])}"
            return f"leads nowhere: {show_key(first)} is neither a stage nor one of {', '.join(TOP)}{hint}"
        if not rest or (first in self._groups and len(rest) == 1 and rest[0] in STEPS and rest[0] != "critique"):
            return f"is a whole section; name a key of it, such as {KEY}.{axis.key}.KEY"
        if "method" in rest[:2] or (first in self._groups and tuple(rest) in (("train",), ("critique",))):
            return _CHANGES_STAGES
        if rest[-1] in HARMLESS and len(rest) == (2 if rest[0] in STEPS else 1):
            return "changes nothing in what is trained, so every run would be the same"
        return None

    def _describe_unknown(self, axis: Axis) -> str | None:
        """Say that no stage has such a key."""
        first, *rest = axis.path
        label, method, key = first, RLAIF if first in self._groups else self._stages[first].method, rest[0]
        if first in self._groups and rest[0] in STEPS:
            label, method, key = f"{first}.{rest[0]}", rest[0], rest[1]
        accepted = [*option_fragments(method)["properties"], *(method_fields(method) if method != RLAIF else ())]
        if key in accepted:
            return None
        return f"{KEY}: {describe_unknown_in_stage(key, stage=label, method=method, accepted=accepted)}"

    def _describe_values(self, axis: Axis) -> str | None:
        seen: dict[str, Node] = {}
        for node, plain in zip(axis.values, axis.plain, strict=True):
            # 1e-1 and 0.1 are one value, and so are 1 and 1.0; true and 1 are two.
            same = json.dumps(float(plain) if isinstance(plain, int) and not isinstance(plain, bool) else plain)
            if same in seen:
                return f"has {show(node)} twice; keep one"
            seen[same] = node
        return None

    def _describe_conflict(self, axis: Axis) -> str | None:
        for other in self.axes:
            if other.path == axis.path:
                return f"is here twice, first at {other.place}; keep one"
            if axis.path[: len(other.path)] == other.path or other.path[: len(axis.path)] == axis.path:
                return f"and {KEY}.{other.key} set the same value; keep one"
        return None


_CHANGES_STAGES = "decides which stages there are; a sweep changes values only: write a section for each"


def _find(tree: Node, path: Collection[str]) -> Node | None:
    node: Node | None = tree
    for key in path:
        node = node.value.get(key) if node is not None and isinstance(node.value, dict) else None
    return node


def _list_stages(tree: Node, group: str) -> list[str]:
    return [stage.name for stage in split_group(group, tree.value[group], tree).stages]


def _label(values: Collection[Node]) -> tuple[str, ...]:
    """Return what names call the values: as they are written where those are distinct file names, else 1, 2, ..."""
    labels = [_shorten(node) or str(position) for position, node in enumerate(values, 1)]
    if len({label.lower() for label in labels}) < len(labels):  # some file systems do not tell a from A
        labels = [str(position) for position in range(1, len(labels) + 1)]
    return tuple(labels)


def _shorten(node: Node) -> str:
    """Return a value as a part of a file name: 2e-4, true, Llama-3.1-8B for meta-llama/Llama-3.1-8B; "" for a list."""
    if isinstance(node.value, (dict, list)):
        return ""
    if node.value is None:
        return "none"
    if not isinstance(node.value, str):
        return (node.text or json.dumps(node.value)).strip().replace("+", "")
    last = re.split(r"[/:]", node.value.rstrip("/:"))[-1]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-.")[:_LONGEST_LABEL].rstrip("-.")
