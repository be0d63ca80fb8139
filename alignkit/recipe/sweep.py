"""What `sweep:` makes of the stages: one of each for every combination of the values that matter to it.

A pure function of the tree. To a stage matter the keys it has itself or from the top level, and all that matters to
the stages it takes something from; so two sweeps that never meet in one stage are not multiplied. The variants are
ordinary stages: each is validated like any other, and a value keeps the place where it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

from alignkit.errors import Problem, RecipeError
from alignkit.recipe.check import describe_unknown, describe_unknown_in_stage, show, show_key
from alignkit.recipe.nearest import suggest
from alignkit.recipe.references import list_names
from alignkit.recipe.rlaif import split_group, stage_name
from alignkit.recipe.schema import FEEDBACK, OPTIONS, RLAIF, STEPS, SWEEP, LoraOptions, ModelOptions, RlaifOptions
from alignkit.recipe.sections import Group, StageTree, Sweep, Variant
from alignkit.recipe.stage import HARMLESS
from alignkit.recipe.trl_fields import method_fields
from alignkit.recipe.yaml import FLAG, Node, lay_value

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
        laid = lay_value(tree, keys, value, key=f"{SWEEP}.{self.key}", where=self.place)
        if keys == ["lora"] and value.value is None:  # no adapters, whether or not the recipe has a lora: section
            laid.value.pop("lora", None)
        return laid


def read_axes(
    tree: Node, stages: Mapping[str, StageTree], groups: Mapping[str, Group]
) -> tuple[list[Axis], list[Problem]]:
    """Return the swept keys in the order in which they are written, and what is wrong with others."""
    node = tree.value.get(SWEEP)
    if node is None or node.value is None:
        return [], []
    reader = _Reader(tree, stages, groups)
    if not isinstance(node.value, dict):
        reader.report(node, f"{SWEEP} is {show(node)}; it must be a mapping, such as {{dpo.beta: [0.05, 0.1, 0.5]}}")
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
            shown = show_key(".".join((SWEEP, *path)))
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
            self.report(node, f"{SWEEP}.{show_key(axis.key)} {problem}")
            return
        if len(path) > 1 and path[0] not in TOP and (unknown := self._describe_unknown(axis)):
            self.report(node, unknown)
            return
        given = _find(self._tree, path)
        if given is not None and given.place == FLAG:
            what = f"{axis.key} is swept, so one value of it has no effect; add `{FLAG} {SWEEP}.{axis.key}=null`"
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
                self.report(node, f"{SWEEP}.{axis.key} {_CHANGES_STAGES}")
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
            return f"is a whole section; name a key of it, such as {SWEEP}.{axis.key}.KEY"
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
        own = RlaifOptions if method == RLAIF else OPTIONS[method]
        accepted = [*own.model_fields, *method_fields(method)]
        if key in accepted:
            return None
        return f"{SWEEP}: {describe_unknown_in_stage(key, stage=label, method=method, accepted=accepted)}"

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
                return f"and {SWEEP}.{other.key} set the same value; keep one"
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


MAX_STAGES = 256
MAX_NAME = 200  # characters; a file name holds 255, and a job's name or a file of the run adds some

Point = tuple[tuple[int, int], ...]  # positions of axes, in order, each with the position of one of its values


def spread(tree: Node, stages: Mapping[str, StageTree], groups: Mapping[str, Group], axes: Sequence[Axis]) -> Sweep:
    """Return the variants of every stage; with no swept key these are the stages as they are.

    `stages` and `groups` are those of the tree. With a problem of the sweep as a whole nothing is swept.
    """
    try:
        return _Spreader(tree, stages, groups, axes).join()
    except _SweepError as error:
        plain = _Spreader(tree, stages, groups, ())  # what else is wrong can still be found
        try:
            return replace(plain.join(), problems=[error.problem])
        except _SweepError:  # a circle without any sweep: `references` has a message for it
            return plain.leave()


class _SweepError(Exception):
    def __init__(self, what: str, place: str) -> None:
        self.problem = Problem(what, place)


class _Spreader:
    def __init__(
        self, tree: Node, stages: Mapping[str, StageTree], groups: Mapping[str, Group], axes: Sequence[Axis]
    ) -> None:
        self._tree, self._axes = tree, axes
        self._place = tree.value[SWEEP].place if axes else tree.place
        self._tops: dict[Point, Node] = {}
        self._read_top(tuple((number, 0) for number in self._list_axes(TOP)))  # the recipe has the first values
        self._editions: dict[str, dict[Point, StageTree]] = {name: {} for name in stages}
        self._groups: list[Group] = []
        self._made: dict[str, list[Variant]] = {}
        self._active: list[str] = []  # stages whose variants wait for those of the one they need
        for stage in stages.values():
            if stage.group is None:
                self._vary_section(stage)
        for name, group in groups.items():
            self._vary_group(name, group)

    # What each stage can be by itself

    def _vary_section(self, stage: StageTree) -> None:
        for point in self._combine(self._list_axes([stage.name]), stage.name):
            node = self._lay(point).value[stage.name] if point else stage.node
            for made in self._vary_top(replace(stage, node=node, point=point)):
                self._editions[stage.name][made.point] = made

    def _vary_group(self, name: str, group: Group) -> None:
        """Expand an rlaif section once for each combination of its values; a step has those that get to it."""
        numbers = self._list_axes([name])
        steps = {number: self._find_steps(number, name) for number in numbers}
        for point in self._combine(numbers, name):
            split = split_group(name, self._lay(point).value[name] if point else group.node, self._tree)
            varied = []
            for stage in split.stages:
                stage.point = tuple((number, value) for number, value in point if stage.name in steps[number])
                varied += self._vary_top(stage)
            split.stages = varied
            self._groups.append(split)
            for stage in varied:
                if stage.name in self._editions:  # else its name is taken, and that has a message of its own
                    self._editions[stage.name].setdefault(stage.point, stage)

    def _find_steps(self, number: int, name: str) -> set[str]:
        axis = self._axes[number]
        splits = [
            (value, split_group(name, axis.lay(self._tree, value).value[name], self._tree)) for value in axis.values
        ]
        return {stage.name for value, split in splits for stage in split.stages if _holds(stage.node, value)}

    def _vary_top(self, stage: StageTree) -> list[StageTree]:
        """Return the stage with every combination of the top level's values that it reads."""
        numbers = [number for number in self._list_axes(TOP) if self._reaches(number, stage)]
        varied = []
        for point in self._combine(numbers, stage.name):
            node = Node(dict(stage.node.value), stage.node.origin, stage.node.line)
            whole = tuple(sorted((*stage.point, *point)))
            varied.append(replace(stage, node=node, broken=set(), top=self._read_top(point), point=whole))
        return varied

    def _reaches(self, number: int, stage: StageTree) -> bool:
        """Tell whether a stage reads a key of the top level: data and eval only where it has none of its own."""
        axis = self._axes[number]
        if axis.path[0] in ("data", "eval"):
            laid = [(value, replace(stage, top=axis.lay(self._tree, value))) for value in axis.values]
            return any(_holds(other.fill(), value) for value, other in laid)
        return axis.path[0] != "lora" or stage.method not in FEEDBACK

    def _list_axes(self, first: Iterable[str]) -> list[int]:
        return [number for number, axis in enumerate(self._axes) if axis.path[0] in first]

    def _combine(self, numbers: list[int], name: str) -> Iterator[Point]:
        self._limit(prod(len(self._axes[number].values) for number in numbers), f"of {name} alone")
        for values in product(*(range(len(self._axes[number].values)) for number in numbers)):
            yield tuple(zip(numbers, values, strict=True))

    def _limit(self, count: int, what: str) -> None:
        if count > MAX_STAGES:
            raise _SweepError(
                f"{SWEEP} makes {count} runs {what}, more than {MAX_STAGES}; give fewer keys or values", self._place
            )

    def _lay(self, point: Point) -> Node:
        tree = self._tree
        for number, value in point:
            tree = self._axes[number].lay(tree, self._axes[number].values[value])
        return tree

    def _read_top(self, point: Point) -> Node:
        if point not in self._tops:
            self._tops[point] = self._lay(point)
        return self._tops[point]

    # What the stages make together

    def join(self) -> Sweep:
        """Return all variants; raises for circles, for too many, and for a swept key that no stage reads."""
        for name in self._editions:
            self._join_stage(name)
        made = {name: self._made[name] for name in self._editions}
        if self._axes:
            self._limit(sum(map(len, made.values())), "in all")
            self._require_use(made)
            self._require_names(made)
        return Sweep(list(self._tops.values()), self._groups, self._list_editions(), made)

    def leave(self) -> Sweep:
        """Return the stages as they are, whatever they say of each other."""
        made = {stage.name: [Variant(stage.name, stage, {}, {})] for stage in self._list_editions()}
        return Sweep(list(self._tops.values()), self._groups, self._list_editions(), made)

    def _list_editions(self) -> list[StageTree]:
        return [stage for editions in self._editions.values() for stage in editions.values()]

    def _join_stage(self, name: str) -> list[Variant]:
        """Return a stage's variants: its own values with each fitting variant of the stages that it needs."""
        if name in self._made:
            return self._made[name]
        self._active.append(name)
        rows: list[tuple[dict[int, int], dict[str, str], StageTree]] = []
        for stage in self._editions[name].values():
            fitting: list[tuple[dict[int, int], dict[str, str]]] = [(dict(stage.point), {})]
            for need, (key, node) in self._list_needs(stage).items():
                if need in self._active:
                    chain = " -> ".join((*self._active[self._active.index(need) :], need))
                    raise _SweepError(f"{stage.say(key)} goes round in a circle: {chain}", node.place)
                fitting = [
                    ({**point, **variant.point}, {**names, need: variant.name})
                    for point, names in fitting
                    for variant in self._join_stage(need)
                    if all(point.get(axis, value) == value for axis, value in variant.point.items())
                ]
                self._limit(len(fitting), f"of {name} alone")
            rows += [(point, names, stage) for point, names in fitting]
        rows.sort(key=lambda row: sorted(row[0].items()))
        self._active.pop()
        self._made[name] = self._name_variants(name, rows)
        return self._made[name]

    def _list_needs(self, stage: StageTree) -> dict[str, tuple[str, Node]]:
        """Return the stages that a stage takes something from, each with one key and node that says so."""
        named = list_names(stage.fill())
        return {
            node.value: (key, node)
            for key, node in named
            if isinstance(node.value, str) and node.value in self._editions
        }

    def _name_variants(self, name: str, rows: list[tuple[dict[int, int], dict[str, str], StageTree]]) -> list[Variant]:
        """Name each variant after the values that tell it from the others: dpo-learning_rate-2e-4-beta-0.1."""
        short = _shorten_keys({number: self._axes[number].path for point, _, _ in rows for number in point})
        variants = []
        for point, names, stage in rows:
            parts, values = [name], {}
            for number, value in sorted(point.items()):
                axis = self._axes[number]
                parts += [short[number], axis.labels[value]]
                values[axis.key] = axis.plain[value]
            variants.append(Variant("-".join(parts), stage, names, values, point))
        return variants

    def _require_use(self, made: Mapping[str, list[Variant]]) -> None:
        used = {number for variants in made.values() for variant in variants for number in variant.point}
        for number, axis in enumerate(self._axes):
            if number not in used:
                raise _SweepError(
                    f"{SWEEP}.{axis.key} has no effect: every stage has {axis.path[0]} of its own, or needs none"
                    if axis.path[0] in TOP
                    else f"{SWEEP}.{axis.key} has no effect: no stage reads it",
                    axis.place,
                )

    def _require_names(self, made: Mapping[str, list[Variant]]) -> None:
        """Refuse names that two runs would have (on some file systems `A` is `a`), or that are too long for a file."""
        taken = {name.lower(): name for name in (*self._tree.value, *made)}
        for name, variants in made.items():
            for variant in variants if [variant.name for variant in variants] != [name] else ():
                other = taken.setdefault(variant.name.lower(), name)
                if len(variant.name) > MAX_NAME:
                    shown = f"{variant.name[:60]}..., longer than {MAX_NAME} characters"
                    what = f"sweep names a run {shown}; sweep fewer keys"
                    raise _SweepError(what, self._place)
                if other != name or variant.name == name:
                    what = f"sweep names a run of {name} {variant.name}, which {other} has already; rename one of them"
                    raise _SweepError(what, self._place)


def _shorten_keys(paths: Mapping[int, tuple[str, ...]]) -> dict[int, str]:
    """Return the shortest end of each dotted key that no other has, as a part of a file name."""
    short = {}
    for number, path in paths.items():
        others = [other for key, other in paths.items() if key != number]
        length = next(n for n in range(1, len(path) + 2) if n > len(path) or all(o[-n:] != path[-n:] for o in others))
        short[number] = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(path[-length:]))
    return short


def _holds(node: Node, value: Node) -> bool:
    return any(leaf is value for _, leaf in node.leaves())


def _rename(node: Node, names: Mapping[int, str]) -> Node:
    """Return a copy in which the nodes of these ids have other values."""
    if id(node) in names:
        return Node(names[id(node)], node.origin, node.line)
    if isinstance(node.value, dict):
        return Node({key: _rename(child, names) for key, child in node.value.items()}, node.origin, node.line)
    if isinstance(node.value, list):
        return Node([_rename(child, names) for child in node.value], node.origin, node.line)
    return node


def rename_stages(variant: Variant) -> Node:
    """Return all that a stage says, with the names of variants where it names swept stages."""
    node = variant.stage.fill()
    new = {id(name): variant.names[name.value] for _, name in list_names(node) if name.value in variant.names}
    return _rename(node, new) if new else node
