"""What `sweep:` makes of the stages: one of each for every combination of the values that matter to it.

A pure function of the tree. To a stage matter the keys it has itself or from the top level, and all that matters to
the stages it takes something from; so two sweeps that never meet in one stage are not multiplied. The variants are
ordinary stages: each is validated like any other, and a value keeps the place where it was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any

from alignkit.errors import Problem
from alignkit.recipe.axes import KEY, TOP, Axis
from alignkit.recipe.references import list_names
from alignkit.recipe.schema import FEEDBACK
from alignkit.recipe.sections import Group, StageTree, split_group
from alignkit.recipe.tree import Node

MAX_STAGES = 256
MAX_NAME = 200  # characters; a file name holds 255, and a job's name or a file of the run adds some
_LISTED = 8

Point = tuple[tuple[int, int], ...]  # positions of axes, in order, each with the position of one of its values


@dataclass(frozen=True)
class Variant:
    """One run of a stage; of a stage that is not swept, the only one."""

    name: str
    stage: StageTree
    names: Mapping[str, str]  # what the stages that it takes something from are called here
    values: Mapping[str, Any]  # of the swept keys that matter to it, as written
    point: Mapping[int, int] = field(default_factory=dict)  # the same by positions of axis and value

    def fill(self) -> Node:
        """Return all that the stage says, with the names of variants where it names swept stages."""
        node = self.stage.fill()
        new = {id(name): self.names[name.value] for _, name in list_names(node) if name.value in self.names}
        return _rename(node, new) if new else node


@dataclass
class Sweep:
    """The stages of a recipe with every value that each of them can have by itself, and what these make together."""

    tops: list[Node]  # the recipe with each combination of swept values of the top level
    groups: list[Group]
    stages: list[StageTree]
    variants: dict[str, list[Variant]] = field(default_factory=dict)  # by the name of the section
    problems: list[Problem] = field(default_factory=list)

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the variants of each swept stage."""
        swept = {name: tuple(variant.name for variant in made) for name, made in self.variants.items()}
        return {name: names for name, names in swept.items() if names != (name,)}


def describe_swept(variants: Sequence[str]) -> str:
    """Say, after its name, that a stage is swept and what its variants are called."""
    more = f", ... ({len(variants)} in all)" if len(variants) > _LISTED else ""
    return f"is swept, so there are several; name one of them: {', '.join(variants[:_LISTED])}{more}"


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
        self._place = tree.value[KEY].place if axes else tree.place
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
                f"{KEY} makes {count} runs {what}, more than {MAX_STAGES}; give fewer keys or values", self._place
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
                    f"{KEY}.{axis.key} has no effect: every stage has {axis.path[0]} of its own, or needs none"
                    if axis.path[0] in TOP
                    else f"{KEY}.{axis.key} has no effect: no stage reads it",
                    axis.place,
                )

    def _require_names(self, made: Mapping[str, list[Variant]]) -> None:
        """Refuse names that two runs would have (on some file systems `A` is `a`), or that are too long for a file."""
        taken = {name.lower(): name for name in (*self._tree.value, *made)}
        for name, variants in made.items():
            for variant in variants if [variant.name for variant in variants] != [name] else ():
                other = taken.setdefault(variant.name.lower(), name)
                if len(variant.name) > MAX_NAME:
                    what = (
                        f"{KEY} names a run {variant.name[:60]}..., longer than {MAX_NAME} characters; sweep fewer keys"
                    )
                    raise _SweepError(what, self._place)
                if other != name or variant.name == name:
                    what = f"{KEY} names a run of {name} {variant.name}, which {other} has already; rename one of them"
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
