"""Which parts of a recipe's tree are stages: sections named after a method, others with `method:`, steps of rlaif.

Knows what a stage is called and what it takes from the recipe; whether its values are right is for others to say.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from alignkit.recipe.advice import describe_unknown_top
from alignkit.recipe.audit import Section
from alignkit.recipe.check import show, show_key
from alignkit.recipe.fields import ELSEWHERE
from alignkit.recipe.nearest import suggest
from alignkit.recipe.rlaif import METHOD as RLAIF
from alignkit.recipe.rlaif import expand, find_unused, list_steps, stage_name
from alignkit.recipe.schema import FEEDBACK, OPTIONS
from alignkit.recipe.tree import Node

SECTIONS = (*OPTIONS, RLAIF)  # names that need no `method:`
METHODS = ", ".join(SECTIONS)


def find_inherited(tree: Node, method: str) -> dict[str, Node]:
    """Return what a stage of a method takes from the recipe when it gives none of its own."""
    keys = ("data",) if method in (*FEEDBACK, RLAIF) else ("data", "eval")
    return {key: tree.value[key] for key in keys if key in tree.value and tree.value[key].value is not None}


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
        if "rm" not in list_steps(self.node.value):
            without += [stage for stage in self.stages if stage.method == "ppo" and "reward" not in self._own(stage)]
        if without and "judge" not in self.node.value:
            missing.add("judge")
        return missing

    def find_unused(self) -> Iterator[tuple[str, str]]:
        """Yield the keys of the section that would have no effect, and why."""
        yield from find_unused(self.node.value)

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


def split_group(name: str, node: Node, top: Node) -> Group:
    """Return an rlaif section with the stages it stands for."""
    stages = []
    for step in expand(name, node):
        shared = {key for key, child in step.node.value.items() if child is node.value.get(key)}
        full = stage_name(name, step.name)
        stages.append(StageTree(full, step.name, step.node, top, group=name, shared=frozenset(shared)))
    return Group(name, node, stages)


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
