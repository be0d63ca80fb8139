"""Which parts of a recipe's tree are stages: sections named after a method, others with `method:`, steps of rlaif.

Knows what a stage is called and what it takes from the recipe; whether its values are right is for others to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkit.errors import Problem
from alignkit.recipe.check import describe_unknown_top, show, show_key
from alignkit.recipe.nearest import suggest
from alignkit.recipe.schema import FEEDBACK, OPTIONS, RLAIF
from alignkit.recipe.trl_fields import ELSEWHERE
from alignkit.recipe.yaml import Node

SECTIONS = (*OPTIONS, RLAIF)  # names that need no `method:`
METHODS = ", ".join(SECTIONS)


def find_inherited(tree: Node, method: str) -> dict[str, Node]:
    """Return what a stage of a method takes from the recipe when it gives none of its own."""
    keys = ("data",) if method in (*FEEDBACK, RLAIF) else ("data", "eval")
    return {key: tree.value[key] for key in keys if key in tree.value and tree.value[key].value is not None}


Finding = tuple[str, str]  # key, what is wrong with it


class UnreadableError(Exception):
    """A rule asked for a value that has a problem of its own."""


@dataclass(frozen=True)
class Section:
    """The values of a stage, or of the whole recipe, that are right in themselves."""

    name: str
    method: str
    values: Mapping[str, Any]
    broken: frozenset[str]
    node: Node
    say: Callable[[str], str] = str  # what messages call a key

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value as given, else the default; raises when the value given is wrong."""
        if key in self.broken:
            raise UnreadableError
        return self.values.get(key, default)

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def place(self, key: str) -> str:
        """Return the place of a key, which may be dotted; of the section when it is not given."""
        node = self.node
        for part in key.split("."):
            if not isinstance(node.value, dict) or part not in node.value:
                break
            node = node.value[part]
        return node.place

    def is_switched_off(self, key: str, *, by: str) -> bool:
        """Tell whether a key lost its effect to a value given elsewhere, which is no mistake.

        Elsewhere is the command line for a key of a file, or another file for one of `extends`, either way round.
        """
        own, other = (self.place(name).rpartition(":")[0] or self.place(name) for name in (key, by))
        return own != other and not own.startswith("--")


@dataclass
class StageTree:
    """A stage section while it is checked; `broken` are keys whose value cannot be relied on."""

    name: str
    method: str
    node: Node
    top: Node  # the recipe, as this stage reads it
    broken: set[str] = field(default_factory=set)
    group: str | None = None  # the rlaif section it is a step of
    shared: frozenset[str] = frozenset()  # keys that it has from there
    point: tuple[tuple[int, int], ...] = ()  # its own values of what is swept: position of the key, of the value

    @property
    def label(self) -> str:
        """Return what messages call the section: as it stands in the file."""
        return self.name if self.group is None else f"{self.group}.{self.method}"

    def say(self, key: str) -> str:
        """Return what messages call a key of it."""
        return f"{self.group if key.split('.')[0] in self.shared else self.label}.{key}"

    @property
    def needs_data(self) -> bool:
        """Whether rows are needed; published chains are rows already."""
        return not (self.method == "critique" and "replay" in self.node.value)

    def fill(self) -> Node:
        """Return all it says, with what the recipe says where it gives nothing."""
        inherited = find_inherited(self.top, self.method) if self.needs_data else {}
        return Node({**inherited, **self.node.value}, self.node.origin, self.node.line)

    def section(self, node: Node | None = None) -> Section:
        """Return the values that are right in themselves; `node` is what `fill` returned, with other names in it."""
        node = node or self.fill()
        values = {key: child.plain() for key, child in node.value.items() if key not in self.broken}
        return Section(self.name, self.method, values, frozenset(self.broken), node, self.say)


def read_method(name: str, node: Node) -> str:
    """Return the method of a section that is a stage or an rlaif section."""
    method = node.value.get("method")
    return str(method.value) if method else name


def describe_not_a_stage(name: str, node: Node) -> str | None:
    """Say why a section that is no key of a recipe is no stage either; None when it is one."""
    is_mapping = isinstance(node.value, dict)
    method = node.value.get("method") if is_mapping else None
    if name in SECTIONS and not is_mapping:
        needed = "constitution" if name == RLAIF else "data"
        return f"{name} is {show(node)}; {'it' if name == RLAIF else 'a stage'} is a mapping with at least `{needed}:`"
    if name in SECTIONS and method is not None and method.value != name:
        article = "a" if name in ("dpo", "critique", "label") else "an"
        return (
            f"{name}.method is {show(method)}; a section named {name} is {article} {name} stage: "
            "take method out, or rename the section"
        )
    if name in SECTIONS or (method is not None and method.value in list(SECTIONS)):
        good = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) and "." not in name
        return None if good else f"stage {show_key(name)}: use letters, digits, '_' and '-' in a stage's name only"
    if method is not None:
        known = ELSEWHERE.get(str(method.value).lower())
        nearest = f"; {known}" if known else suggest(method.value, SECTIONS) if isinstance(method.value, str) else ""
        return f"{show_key(name)}.method is {show(method)}; it must be one of {METHODS}{nearest}"
    return describe_unknown_top(name, is_mapping=is_mapping)


@dataclass
class Group:
    """An rlaif section while it is checked."""

    name: str
    node: Node
    stages: list[StageTree]

    def mark_broken(self, key: str) -> None:
        """Let nobody rely on a key of the section: not the stages that have it from there either."""
        for stage in self.stages:
            if key in stage.shared:
                del stage.node.value[key]
                stage.shared -= {key}
            if key not in stage.node.value:
                stage.broken.add(key)
            if key in ("judge", "constitution") and "reward" not in self._own(stage):
                stage.broken.add("reward")

    def find_missing(self, required: Collection[str]) -> set[str]:
        """Return the keys that the section or one of its stages needs, and that are nowhere."""
        missing = {key for key in required if key not in self.node.value and key != "method"}
        without = [stage for stage in self.stages if stage.method == "label" and "judge" not in stage.node.value]
        if not any(stage.method == "rm" for stage in self.stages):
            without += [stage for stage in self.stages if stage.method == "ppo" and "reward" not in self._own(stage)]
        if without and "judge" not in self.node.value:
            missing.add("judge")
        return missing

    def find_clashes(self, taken: Collection[str]) -> Iterator[str]:
        """Yield what is wrong when the recipe has a section of the name of one of the stages."""
        for stage in self.stages:
            if stage.name in taken:
                yield f"{self.name} has a stage {stage.name}, and so has the recipe; rename one of the two sections"

    def place(self, key: str) -> str:
        return str(self.node.value[key].place if key in self.node.value else self.node.place)

    def _own(self, stage: StageTree) -> Collection[str]:
        own = self.node.value.get(stage.method)
        return own.value if own is not None and isinstance(own.value, dict) else ()


@dataclass(frozen=True)
class Variant:
    """One run of a stage; of a stage that is not swept, the only one."""

    name: str
    stage: StageTree
    names: Mapping[str, str]  # what the stages that it takes something from are called here
    values: Mapping[str, Any]  # of the swept keys that matter to it, as written
    point: Mapping[int, int] = field(default_factory=dict)  # the same by positions of axis and value


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
